"""Measure a suite, hold it against a baseline, and measure again what looks worse before it is called so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membench.regression.measured import Measured
from membench.regression.tolerances import Tolerances
from membench.regression.verdict import Judgement
from membench.session import silent
from membench.store import Run
from membench.suite import Suite


def check(
    suite: Suite,
    base: Measured,
    tolerances: Tolerances,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    across_machines: bool = False,
    tell: Callable[[str, Mapping[str, Any]], None] = silent,
) -> tuple[Run, Judgement]:
    """Run a suite and judge it; suspects are measured three more times, in the same run, before the last word.

    Raises:
        ResultsError: if the run's file cannot be written.
    """
    raise NotImplementedError


def confirm(
    run: Run,
    suite: Suite,
    base: Measured,
    tolerances: Tolerances,
    *,
    across_machines: bool = False,
    tell: Callable[[str, Mapping[str, Any]], None] = silent,
) -> tuple[Run, Judgement]:
    """Judge a run that was made here and now, and measure its suspects again (as ``check`` does)."""
    raise NotImplementedError
