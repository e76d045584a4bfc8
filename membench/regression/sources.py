"""What the name of a measurement means: a run's file, a baseline's, or a baseline by name."""

from __future__ import annotations

from pathlib import Path

from membench.regression.measured import Measured


def load(what: str, results: Path = Path("results")) -> Measured:
    """Read what is named.

    In this order: a path of a run (``.jsonl``) or of a baseline (``.json``); the name of a baseline in
    ``results/baselines``; that of a run in ``results``.

    Raises:
        ResultsError: if there is no such thing, with the nearest name, or it cannot be read.
    """
    raise NotImplementedError


def baseline_for(measured: Measured, results: Path = Path("results")) -> Measured:
    """The baseline of a measurement's suite for its class of machines.

    Raises:
        CannotCompare: if none is kept, with those that are.
    """
    raise NotImplementedError
