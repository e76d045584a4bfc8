"""Measure a suite and compare it with a baseline; cases that look worse are measured again before the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membench.comparing import suspects
from membench.records.run_file import Run
from membench.regression.judging import judge
from membench.regression.measured import Measured, MeasuredCase, of_run
from membench.regression.verdict import Judgement
from membench.running import references, session
from membench.running.executors.executor import Opener
from membench.running.executors.local import LocalExecutor
from membench.suite.suite import Suite
from membench.suite.tolerances import Tolerances


def expected(suite: Suite) -> Measured:
    """Describe what a suite would measure on this machine: its cases and the machine, without values."""
    cases = {case.id: MeasuredCase(case.id, "ok", device=case.device) for case in suite.cases}
    return Measured(suite.name, suite.name, session.machine_of(suite), "", cases)


def check(
    suite: Suite,
    base: Measured,
    tolerances: Tolerances,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    across_machines: bool = False,
    tell: Callable[[str, Mapping[str, Any]], None] = session.silent,
    executor: Opener = LocalExecutor,
) -> tuple[Run, Judgement]:
    """Run a suite and judge it. Suspects are measured again, in the same run, before the final judgement.

    Raises:
        ResultsError: if the run's file cannot be written.
    """
    first = session.run(suite, keep=keep, output=output, tell=tell, executor=executor, keeps_references=True)
    try:
        return suspects.confirm(
            first,
            judge=lambda run: judge(base, of_run(run), tolerances, across_machines=across_machines),
            measure_again=lambda run, ids, repeats: session.measure_again(
                suite, run.path, ids, repeats, tell, executor
            ),
        )
    finally:
        references.remove(first.path)
