"""Estimates of a suite's cases."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from membench.records.run_file import Run
from membench.running.jobs.estimate import estimate_from_case
from membench.running.rank import Tell
from membench.running.session import run, silent
from membench.suite.suite import Suite


def estimate(
    suite: Suite,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path | None = None,
    tell: Tell = silent,
) -> Run:
    """Estimate what a suite's cases need, without running them.

    Args:
        suite: a suite as returned by ``load_suite``.
        keep: returns whether to estimate the case with an id; required references are always estimated.
        output: a folder in which the estimates are kept as a run's file; ``None``: they are not kept.
        tell: as for ``run``.

    Returns:
        records with the figures that are estimated, in bytes; ``obtained`` says of each whether it is traced or
        arithmetic, and what it leaves out. A case that cannot be estimated is ``skipped`` with the reason.

    Raises:
        SuiteError: if a case is a program.
        ResultsError: if the file cannot be written.
    """
    suite = suite.with_repeats(1)
    if output is not None:
        return run(suite, keep=keep, output=output, tell=tell, job_of=estimate_from_case)
    with tempfile.TemporaryDirectory(prefix="membench-estimate-") as folder:
        return run(suite, keep=keep, output=folder, tell=tell, job_of=estimate_from_case)
