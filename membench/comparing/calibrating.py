"""Measure the same code repeatedly, to estimate the run-to-run variation on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membench.records.run_file import Run, read_run
from membench.running.executors.executor import Opener
from membench.running.executors.local import LocalExecutor
from membench.running.session import Session, silent
from membench.suite.suite import Suite


def calibrate(
    suite: Suite,
    repeats: int,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    tell: Callable[[str, Mapping[str, Any]], None] = silent,
    executor: Opener = LocalExecutor,
) -> Run:
    """Measure each case ``repeats`` times, each time from a new fork server, as in runs that are compared.

    Args:
        tell: receives the events of ``session.run``.

    Raises:
        ResultsError: if the run's file cannot be written.
    """
    cases = suite.select(keep)
    with Session(suite.with_repeats(repeats), cases, Path(output), tell=tell, executor=executor) as session:
        session.measure_all([(case, repeat) for repeat in range(repeats) for case in cases], afresh=True)
    return read_run(session.path)
