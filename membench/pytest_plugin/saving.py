"""``--membench-save``: saves the measurements of a pytest run in baselines, and keeps their other cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from membench.pytest_plugin.judging import how_to_repeat
from membench.pytest_plugin.sharing import suite_baseline_name
from membench.records.run_file import Run
from membench.regression import baselines
from membench.regression.decision import said_of_few_times
from membench.regression.measured import Measured, of_run


def save(runs: Sequence[Run], name: str, results: Path) -> list[str]:
    """Save runs as baselines, and return one or two lines on each.

    Cases of a baseline that were not measured stay: ``-k``, ``-x`` and ``--lf`` remove nothing.

    Args:
        name: the requested name; if empty, each suite's default name for this class of machines.

    Raises:
        ResultsError: if a baseline cannot be written or would mix two machines.
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
        if note := said_of_few_times(baseline, new, f"to have them judged {how_to_repeat(measured.suite)}"):
            lines.append(note)
    return lines


def _name(measured: Measured, name: str, runs: int, folder: Path) -> str:
    """Return the name of a suite's baseline: with several suites, each has a part with its own name.

    A baseline that was saved for one suite alone keeps its name when other suites are added.
    """
    own, kept = suite_baseline_name(name, measured.suite), baselines.names(folder)
    if own in kept:
        return own
    if name in kept:
        return name if baselines.named(name, folder).suite == measured.suite else own
    return own if runs > 1 else name


def _cases(count: int) -> str:
    return f"{count} {'case' if count == 1 else 'cases'}"


def shown_path(path: Path) -> Path:
    """Return a path relative to the current folder if it is inside, else unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
