"""One figure, then and now: has it got worse or better, or can that not be told, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from membench.records.disturbed_times import WHY
from membench.records.metric import Metric
from membench.regression.bounds import proven
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.timing import LEAST_REPEATS, Timing, compare

Verdict = Literal["regressed", "undecided", "not judged", "worse", "better", "same"]
"""``undecided``: worse than is tolerated, but not told from chance; measuring again may. ``not judged``: the figure is
not known on one side, or hangs on a machine that differs; the reason is said. ``worse``: of a figure that is not
watched."""

_LEAST_OF_A_STEP = 0.01
"""What is left of a step at least, whatever its threads waited."""

_CALM = "measure times where less else is done, or let cases wait longer for calm (calm_within_s in [settings])"
_IN_TURN = "to tell such a time from chance, measure both in turn: 'membench run SUITE --against-ref GIT_REF'"
_MORE_REPEATS = (
    "to tell a time that was measured once or twice from chance, measure both in turn ('membench run SUITE"
    f" --against-ref GIT_REF'), set repeats = {LEAST_REPEATS} in [settings] for both (--repeats {LEAST_REPEATS} for a"
    " script), or let 'membench calibrate SUITE [NAME]' keep this machine's noise with the baseline"
)


_TIME = "step_median_s"


def said_of_few_times(baseline: Measured, case_ids: Collection[str], remedy: str) -> str | None:
    """What whoever keeps these cases must know of their times; ``None`` where each can be told from chance."""
    for case_id in case_ids:
        count = len(baseline.cases[case_id].values.get(_TIME, ()))
        if 0 < count < LEAST_REPEATS and not baseline.noise.factor(case_id, _TIME):
            return (
                f"times were measured less than {LEAST_REPEATS} times: none will be called slower than these; {remedy}"
            )
    if any(_TIME in baseline.cases[case_id].disturbed for case_id in case_ids):
        return f"while times were measured, {WHY}: none will be called slower than these; {_CALM}"
    return None


class Decision(NamedTuple):
    """A verdict; why it is undecided; what would decide it."""

    verdict: Verdict
    reason: str | None = None
    advice: str | None = None


def decide(metric: Metric, base: MeasuredCase, new: MeasuredCase, allowed: float, *, is_watched: bool) -> Decision:
    """Of a figure that is known on both sides and is no time.

    Args:
        allowed: by how much it may get worse, in its unit.
    """
    before, now = base.value(metric.field), new.value(metric.field)
    assert before is not None
    assert now is not None
    worse: Verdict = "regressed" if is_watched else "worse"
    bounds = [case.bounds.get(metric.field) for case in (base, new)]
    is_less_better = metric.better == "lower"
    if bounds[0] != bounds[1]:
        found = proven(before, bounds[0], now, bounds[1], is_less_better=is_less_better, allowed=allowed)
        if found is None:
            told = [
                f"the {whose} figure is {bound} this much"
                for whose, bound in zip(("base's", "new"), bounds, strict=True)
                if bound
            ]
            return Decision("undecided", f"of bounds: {', '.join(told)}") if is_watched else Decision("same")
        return Decision({"worse": worse, "better": "better", "no worse": "same"}[found])
    # Two bounds of one kind were obtained in the same way, and are held against each other as they are.
    worse_by = now - before if is_less_better else before - now
    if abs(worse_by) <= allowed:
        return Decision("same")
    return Decision(worse if worse_by > 0 else "better")


def decide_time(
    metric: Metric, base: MeasuredCase, new: MeasuredCase, allowed: float, timing: Timing | None, noise: float | None,
    *, is_watched: bool,
) -> Decision:  # fmt: skip
    """Of a duration or a rate: a change beyond what is allowed, and not by chance.

    Args:
        allowed: by how much it may get worse, in its unit.
        noise: the factor by which runs of the same code differ on this machine, where that is known.
    """
    before, now = base.value(metric.field), new.value(metric.field)
    assert before is not None
    assert now is not None
    worse_by = now - before if metric.better == "lower" else before - now
    if abs(worse_by) <= allowed:
        return Decision("same")
    by = allowed / abs(before) if before else 0.0
    if disturbed := _disturbed(metric, base, new):
        return disturbed if is_watched and worse_by > 0 else Decision("same")
    if worse_by < 0:
        return Decision("better" if timing and timing.is_certainly_faster(by, noise) else "same")
    if timing is None:
        doubt = Decision("undecided", "it is 0 on one side")
    elif not timing.is_certainly_slower(by, noise):
        doubt = _doubt(timing, noise)
    elif _is_of_waiting(metric, base, new, by, noise):
        doubt = Decision("undecided", "the rest of it went to waiting for a core: the machine is busy", _IN_TURN)
    else:
        return Decision("regressed" if is_watched else "worse")
    return doubt if is_watched else Decision("same")


def _disturbed(metric: Metric, base: MeasuredCase, new: MeasuredCase) -> Decision | None:
    """Why nothing follows from a time that other processes disturbed on either side."""
    sides = [whose for whose, case in (("the base", base), ("now", new)) if metric.field in case.disturbed]
    if not sides:
        return None
    return Decision("undecided", f"{WHY} ({' and '.join(sides)})", _CALM)


def _doubt(timing: Timing, noise: float | None) -> Decision:
    """Why a time that looks slower is not told from chance."""
    if noise is not None and timing.ratio <= noise:
        reason = f"runs of the same code may differ by {(noise - 1) * 100:.2g}% on this machine"
        return Decision("undecided", reason, _IN_TURN)
    if noise is None and not timing.are_enough:
        which = "" if timing.repeats_new < LEAST_REPEATS else "the base was "
        repeats = min(timing.repeats_base, timing.repeats_new)
        times = "once" if repeats == 1 else f"{repeats} times"
        return Decision("undecided", f"{which}measured {times}, which a busy machine can look like", _MORE_REPEATS)
    reason = f"its {timing.repeats_new} repeats are not all slower: chance is not ruled out"
    return Decision("undecided", reason, _IN_TURN)


def timing_of(base: MeasuredCase, new: MeasuredCase, metric: Metric) -> Timing | None:
    """A time against the earlier one, from its samples; a rate as what one of it takes."""
    if metric.depends_on != "time":
        return None
    sides: list[list[list[float]]] = []
    for case in (base, new):
        # Where single durations are not kept, or there is one a repeat, the repeats are all there is.
        repeats = case.samples.get(metric.field) or [[value] for value in case.values[metric.field]]
        slower = [
            [1 / each if metric.better == "higher" else each for each in repeat if each > 0] for repeat in repeats
        ]
        sides.append([repeat for repeat in slower if repeat])
    before, now = sides
    if not before or not now:
        return None
    return compare(before, now)


def _is_of_waiting(metric: Metric, base: MeasuredCase, new: MeasuredCase, by: float, noise: float | None) -> bool:
    """Whether steps took no longer than is tolerated, were it not that others had the cores."""
    if metric.part != "step" or not new.waited_s:
        return False
    if not base.samples.get("step_median_s") or not new.samples.get("step_median_s"):
        return False
    sides = [_without_waiting(base), _without_waiting(new)]
    return not compare(*sides).is_certainly_slower(by, noise)


def _without_waiting(case: MeasuredCase) -> list[list[float]]:
    """The durations of steps less what their threads waited for a core.

    Threads that wait at the same time are each counted, so that too much may go: that excuses, and accuses nobody.
    """
    steps = case.samples["step_median_s"]
    waited = case.waited_s or [[0.0] * len(repeat) for repeat in steps]
    return [
        [max(step - gone, _LEAST_OF_A_STEP * step) for step, gone in zip(repeat, of_repeat, strict=True)]
        for repeat, of_repeat in zip(steps, waited, strict=True)
    ]
