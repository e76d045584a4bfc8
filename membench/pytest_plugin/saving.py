"""``--membench-save``: what a pytest run measured becomes baselines, beside what these hold of other tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from membench.pytest_plugin.judging import how_to_repeat
from membench.pytest_plugin.sharing import own_name
from membench.records.run_file import Run
from membench.regression import baselines
from membench.regression.decision import said_of_few_times
from membench.regression.measured import Measured, of_run


def save(runs: Sequence[Run], name: str, results: Path) -> list[str]:
    """Save runs, and say so in a line or two each.

    ``-k``, ``-x`` and ``--lf`` take nothing out of a baseline.

    Args:
        name: as it was asked for; empty: each suite's own for this class of machines.

    Raises:
        ResultsError: if one cannot be written, or would be of two machines.
    """
    lines = []
    folder = results / baselines.FOLDER.name
    for run in runs:
        measured = of_run(run)
        own = _name(measured, name, len(runs), folder) if name else baselines.default_name(measured)
        path = shown_path(baselines.path_of(own, folder))
        new = [case_id for case_id, case in measured.cases.items() if case.is_measured]
        baseline, stay = baselines.write_into(measured, path)
        beside = f", beside {_cases(stay)} as before" if stay else ""
        lines.append(f"saved as baseline {path}: {_cases(len(new))} as measured now{beside}")
        if said := said_of_few_times(baseline, new, f"to have them judged {how_to_repeat(measured.suite)}"):
            lines.append(said)
    return lines


def _name(measured: Measured, name: str, runs: int, folder: Path) -> str:
    """The baseline of this name that is the suite's own: where there are several suites each has its part.

    A part is told by its name; what was saved of one suite alone stays its baseline when others come.
    """
    own, kept = own_name(name, measured.suite), baselines.names(folder)
    if own in kept:
        return own
    if name in kept:
        return name if baselines.named(name, folder).suite == measured.suite else own
    return own if runs > 1 else name


def _cases(count: int) -> str:
    return f"{count} {'case' if count == 1 else 'cases'}"


def shown_path(path: Path) -> Path:
    """A path as short as it can be."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
