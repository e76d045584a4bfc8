"""Comparing two measurements of the same cases, with a verdict on each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from membench.records.metric import Dependence, Metric
from membench.records.metrics import is_of_held_out_text, metrics_with
from membench.regression.attribution import causes
from membench.regression.decision import Decision, decide, decide_time, timing_of
from membench.regression.machines import Difference, differences
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.noise import Noise
from membench.regression.timing import Timing
from membench.regression.verdict import Change, Judgement, Pair
from membench.suite.tolerances import Tolerance, Tolerances
from membench.units import BYTES

_RESOLUTIONS = 2
"""How many resolutions a value of the kernel's counters may be off. A resolution is what one core may hold back at one
moment; a peak is read over several moments, and the highest of 50 runs is further off than most."""
_PAGE_BYTES = 4096
"""The smallest unit of memory: a smaller change is no change."""
_SAME_WITHOUT_RATIO = 0.05
_NOTHING = 1e-6
"""The tolerance for values without a ratio (divergences, shares) that no tolerance covers."""


def judge(
    base: Measured,
    new: Measured,
    tolerances: Tolerances,
    *,
    across_machines: bool = False,
    in_turn: bool = False,
) -> Judgement:
    """Compare every case of the base with the same one of the new measurement.

    Args:
        across_machines: judge values that depend on the machine although it differs.
        in_turn: whether both were measured in turn.
    """
    unlike = differences(base.machine, new.machine)
    pairs = []
    for case_id in dict.fromkeys([*base.cases, *new.cases]):
        before, now = base.cases.get(case_id), new.cases.get(case_id)
        if before is None or now is None:
            pairs.append(Pair(case_id, before, now, broke=_broke(now) if now else None))
        else:
            barring = () if across_machines else unlike
            pairs.append(judge_case(before, now, tolerances, noise=base.noise, differences=barring))
    return Judgement(base, new, tuple(pairs), unlike, in_turn)


def judge_case(
    base: MeasuredCase,
    new: MeasuredCase,
    tolerances: Tolerances,
    *,
    noise: Noise | None = None,
    differences: Sequence[Difference] = (),
) -> Pair:
    """Compare two measurements of one case.

    Args:
        noise: the noise of the machine.
        differences: the differences between the machines, with the kinds of metrics that they bar.
    """
    if not base.is_measured or not new.is_measured or (base.status == "ok" and new.status != "ok"):
        return Pair(base.id, base, new, broke=_broke(new) if base.is_measured else None)
    barred: dict[Dependence, Difference] = {}
    for difference in differences:
        for each in difference.bars(base.on_gpu or new.on_gpu):
            barred.setdefault(each, difference)
    known = noise or Noise()
    changes = (
        _change(base, new, metric, tolerances, known, barred) for metric in metrics_with((*base.values, *new.values))
    )
    return Pair(base.id, base, new, tuple(change for change in changes if change is not None))


def _broke(new: MeasuredCase) -> str | None:
    """Return how a case failed, or ``None``. A skipped case was not measured, which is no failure."""
    if new.status in ("ok", "skipped"):
        return None
    where = f" in {new.ended_in}" if new.ended_in else ""
    return f"{new.status}{where}: {new.message}"


def _change(
    base: MeasuredCase,
    new: MeasuredCase,
    metric: Metric,
    tolerances: Tolerances,
    noise: Noise,
    barred: Mapping[Dependence, Difference],
) -> Change | None:
    field = metric.field
    before, now = base.value(field), new.value(field)
    held = tolerances.of(base.id, metric)
    if before is None and now is None:
        return None
    if before is None or now is None:
        whose, case = ("base", base) if before is None else ("new measurement", new)
        reason = f"the {whose} does not have it: {case.reasons.get(field, 'it has no such figure')}"
        # A metric that is new has nothing to be compared with.
        closest = held[0] if held and before is not None else None
        return Change(base.id, metric, before, now, "not judged", reason=reason, tolerance=closest)
    closest = min(held, key=lambda one: one.allowed(before)) if held else None
    is_time = metric.depends_on == "time"
    factor = noise.factor(base.id, field) if is_time else None
    floor = (factor - 1) * abs(before) if factor else 0.0 if is_time else noise.floor(base.id, field)
    allowed = _allowed(metric, before, closest, base, new, 0.0 if is_time else floor)
    timing = timing_of(base, new, metric)
    ratio = now / before if metric.has_ratio and before else None
    is_barred = barred.get(metric.depends_on)
    other_text = _other_text(base, new, metric)
    if other_text:
        judged = Decision("not judged", other_text)
    elif is_barred:
        judged = Decision("not judged", f"the machines differ in {is_barred}")
    elif is_time:
        judged = decide_time(metric, base, new, allowed, timing, factor, is_watched=closest is not None)
    else:
        judged = decide(metric, base, new, allowed, is_watched=closest is not None)
    return Change(
        base.id,
        metric,
        before,
        now,
        judged.verdict,
        ratio,
        _as_ratio_of_metric(metric, timing),
        None if timing is None else timing.p_value,
        None if closest is None else allowed,
        closest,
        floor,
        judged.reason,
        judged.advice,
        () if judged.verdict in ("same", "not judged") else causes(metric, base, new),
        len(new.values[field]),
        bool(is_barred),
        field in base.disturbed,
        field in new.disturbed,
    )


def _other_text(base: MeasuredCase, new: MeasuredCase, metric: Metric) -> str | None:
    """Return why a quality that was judged over more text here than there cannot be compared."""
    if not is_of_held_out_text(metric) or list(base.judged_tokens) == list(new.judged_tokens):
        return None
    before, now = (" and ".join(map(str, case.judged_tokens)) or "all" for case in (base, new))
    return f"it was judged over {before} tokens of held-out text, and now over {now}; a larger evaluate_s gives it time"


def _allowed(
    metric: Metric, before: float, closest: Tolerance | None, base: MeasuredCase, new: MeasuredCase, floor: float
) -> float:
    """Return by how much a value may get worse: the tolerance plus the error of its sources, or the noise."""
    within = metric.same_within if metric.has_ratio else _SAME_WITHOUT_RATIO
    tolerated = max(within * abs(before), _NOTHING) if closest is None else closest.allowed(before)
    off = sum(case.resolution_bytes.get(metric.field, 0) for case in (base, new))
    smallest = _PAGE_BYTES if metric.unit is BYTES else 0
    return max(tolerated + _RESOLUTIONS * off, floor, smallest)


def _as_ratio_of_metric(metric: Metric, timing: Timing | None) -> tuple[float, float] | None:
    if timing is None or timing.interval is None:
        return None
    low, high = timing.interval
    return (low, high) if metric.better == "lower" else (1 / high, 1 / low)
