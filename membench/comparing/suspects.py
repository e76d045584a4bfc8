"""Measure suspects again before the verdict: one loop for suites, for two commits and for pytest's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from membench.regression.verdict import Judgement

MORE_REPEATS = 3
"""For each suspect. A median is then over at least four measurements, and times are judged over several repeats."""

_Results = TypeVar("_Results")


def confirm(
    measured: _Results,
    judge: Callable[[_Results], Judgement],
    measure_again: Callable[[_Results, Sequence[str], int], _Results],
) -> tuple[_Results, Judgement]:
    """Judge a measurement; if cases look worse, measure these again and judge once more.

    Args:
        measured: a run, a pair of runs or a test's records, as the two functions understand it.
        judge: compares a measurement with its base.
        measure_again: gets the measurement, the suspects' case ids and how often to measure each; returns the
            measurement with the new repeats added to the earlier ones.

    Returns:
        the measurement, including any repeats, and the final judgement.
    """
    judgement = judge(measured)
    if judgement.suspects:
        measured = measure_again(measured, judgement.suspects, MORE_REPEATS)
        judgement = judge(measured)
    return measured, judgement
