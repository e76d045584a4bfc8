"""What the name of a measurement means: a run's file, a baseline's, or either by name."""

from __future__ import annotations

import os
from pathlib import Path

from membench.errors import CannotCompare, ResultsError, did_you_mean
from membench.records.run_file import Run, read_run
from membench.records.validation import shown
from membench.regression import baselines
from membench.regression.measured import Measured, of_run

_RESULTS = Path("results")


def load(what: str, results: Path = _RESULTS) -> Measured:
    """Read what is named.

    In this order: a path of a run (``.jsonl``) or of a baseline (``.json``); the name of a baseline in
    ``results/baselines``; that of a run in ``results``.

    Raises:
        ResultsError: if there is no such thing, with the nearest name, or it cannot be read.
    """
    return load_with_run(what, results)[0]


def load_with_run(what: str, results: Path = _RESULTS) -> tuple[Measured, Run | None]:
    """As ``load``, and the run itself where it is one."""
    path = _path(what, results)
    if path.suffix == ".json":
        return baselines.read(path), None
    run = read_run(path)
    return of_run(run, path.stem), run


def _path(what: str, results: Path) -> Path:
    if os.sep in what or what.endswith((".json", ".jsonl")):
        path = Path(what)
        if not path.is_file():
            raise ResultsError(f"{shown(what)}: there is no such file")
        return path
    if not baselines.is_name(what):
        raise ResultsError(f"{shown(what)} is neither a file nor the name of a run or a baseline")
    folder = results / baselines.FOLDER.name
    if what in baselines.names(folder):
        return baselines.path_of(what, folder)
    run = results / f"{what}.jsonl"
    if run.is_file():
        return run
    known = [*baselines.names(folder), *(path.stem for path in results.glob("*.jsonl"))]
    raise ResultsError(f"no baseline and no run is named {shown(what)} in {results}; {did_you_mean(what, known)}")


def baseline_path(measured: Measured, results: Path = _RESULTS) -> Path:
    """Where the baseline of a measurement's suite for its class of machines lies, or would."""
    return baselines.path_of(baselines.default_name(measured), results / baselines.FOLDER.name)


def baseline_for(measured: Measured, results: Path = _RESULTS) -> Measured:
    """The baseline of a measurement's suite for its class of machines.

    Raises:
        CannotCompare: if none is kept, with those that are.
    """
    path = baseline_path(measured, results)
    if path.is_file():
        return baselines.read(path)
    kept = [name for name in baselines.names(path.parent) if name.partition("@")[0] == measured.suite]
    others = f"there are {', '.join(kept)}: name one with --against" if kept else "'membench baseline save' keeps one"
    raise CannotCompare(f"no baseline is named '{path.stem}' in {path.parent}; {others}")
