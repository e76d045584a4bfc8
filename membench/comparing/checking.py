"""Measure a suite, hold it against a baseline, and measure again what looks worse before it is called so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membench.records.run_file import Run
from membench.regression.judging import judge
from membench.regression.measured import Measured, MeasuredCase, of_run
from membench.regression.verdict import Judgement
from membench.running import session
from membench.suite.suite import Suite
from membench.suite.tolerances import Tolerances

MORE_REPEATS = 3
"""Of each suspect: a figure's median is then of four measurements, and the last word of a time hangs on several."""


def expected(suite: Suite) -> Measured:
    """What measuring a suite here is going to be of, figures aside: its cases, this machine."""
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
) -> tuple[Run, Judgement]:
    """Run a suite and judge it; suspects are measured three more times, in the same run, before the last word.

    Raises:
        ResultsError: if the run's file cannot be written.
    """
    run = session.run(suite, keep=keep, output=output, tell=tell)
    return confirm(run, suite, base, tolerances, across_machines=across_machines, tell=tell)


def confirm(
    run: Run,
    suite: Suite,
    base: Measured,
    tolerances: Tolerances,
    *,
    across_machines: bool = False,
    tell: Callable[[str, Mapping[str, Any]], None] = session.silent,
) -> tuple[Run, Judgement]:
    """Judge a run that was made here and now, and measure its suspects again (as ``check`` does)."""
    judgement = judge(base, of_run(run), tolerances, across_machines=across_machines)
    if judgement.suspects:
        run = session.measure_again(suite, run.path, judgement.suspects, MORE_REPEATS, tell)
        judgement = judge(base, of_run(run), tolerances, across_machines=across_machines)
    return run, judgement
