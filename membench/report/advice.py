"""Which measured stack fits into a budget of memory and loses least, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from membench.compare import CERTAIN, NO_DIVERGENCE, SAME_ACCURACY, Comparison, Group
from membench.record import METRIC_OF_FIELD, REFERENCE, Record
from membench.report.text import said_of, signed
from membench.units import format_bytes, format_divergence, format_percent, format_seconds

_NEEDED = ("peak_footprint_bytes", "load_peak_live_bytes", "apply_peak_live_bytes", "store_peak_live_bytes",
           "warmup_peak_live_bytes", "peak_live_bytes")  # fmt: skip
"""What has to find room at one time or another; a case needs the highest of them."""

_MUST_BE_KNOWN = ("peak_footprint_bytes", "peak_live_bytes")

HELD_AGAINST = (
    "Held against the budget is the highest of the footprint peak and the live peaks of loading, converting, packing"
    " data, the first step and running."
)


@dataclass(frozen=True)
class Advice:
    """What is advised for a model, workload and device; ``technique`` is ``None`` where nothing fits."""

    group: Group
    technique: str | None
    why: str
    others: tuple[tuple[str, str], ...]
    """Each other technique, and why it is not advised."""


@dataclass(frozen=True)
class _Need:
    """How much memory a case needs: surely ``at_least_bytes``; no more than ``at_most_bytes``, where that is known."""

    field: str
    at_least_bytes: float
    at_most_bytes: float | None
    off_bytes: float
    """How far off its source may be."""

    def __str__(self) -> str:
        if self.at_most_bytes is None:
            amount = f"{format_bytes(self.at_least_bytes)} or more, as far as samples saw"
        elif self.at_most_bytes > self.at_least_bytes:
            amount = f"{format_bytes(self.at_least_bytes)} to {format_bytes(self.at_most_bytes)}"
        else:
            amount = format_bytes(self.at_least_bytes)
        return f"{amount} at its {METRIC_OF_FIELD[self.field].title}"


@dataclass(frozen=True)
class _Loss:
    """What quality a case loses against its reference: percent where it has one, else the divergence; and in words."""

    percent: float | None
    rank: float
    told: str


def advise(records: Sequence[Record], budget_bytes: int, most_loss_percent: float | None = None) -> list[Advice]:
    """Of each model, workload and device, what fits and loses least.

    Of those that lose the same, the fastest is advised; of those as fast, as far as can be told, the smallest.

    Args:
        budget_bytes: for what a case takes above the worker's baseline.
        most_loss_percent: of the reference's bits per byte, or percentage points of accuracy; what is not known to lose
            no more is not advised.
    """
    found = Comparison(records)
    return [_of_group(found, group, budget_bytes, most_loss_percent) for group in found.groups]


def lines(records: Sequence[Record], given: Sequence[Advice]) -> Iterator[str]:
    """Advice as text, with what it is held against."""
    for advice in given:
        yield " · ".join(advice.group)
        yield f"  {advice.technique}: {advice.why}" if advice.technique else f"  {advice.why}"
        for technique, why in advice.others:
            yield f"  not {technique}: {why}"
        yield ""
    yield f"{HELD_AGAINST} {_baseline(records)}"


def _baseline(records: Sequence[Record]) -> str:
    """What comes on top of every figure: they count from the worker before the case."""
    taken = [
        sum(process["baseline"].values())
        for record in records for process in record.processes[:1]
        if process.get("baseline") and record.case["device"] == "cpu"
    ]  # fmt: skip
    if not taken:
        return "What the interpreter and its libraries take comes on top."
    return f"What the interpreter and its libraries take comes on top: up to {format_bytes(max(taken))} in this run."


def _of_group(found: Comparison, group: Group, budget_bytes: int, most_loss_percent: float | None) -> Advice:
    refused: dict[str, str] = {}
    fitting: dict[str, tuple[_Need, _Loss]] = {}
    for technique in found.techniques(group):
        reason = _unfit(found, group, technique)
        need, loss = _need(found, group, technique), _loss(found, group, technique)
        if reason is None and need is not None:
            reason = _over(need, budget_bytes) or _loses_too_much(loss, most_loss_percent)
        if reason is None and need is not None:
            fitting[technique] = need, loss
        else:
            refused[technique] = reason or "what memory it needs is not known"
    if not fitting:
        why = f"no measured stack fits {format_bytes(budget_bytes)}"
        if most_loss_percent is not None:
            why += f" and is known to lose no more than {format_percent(most_loss_percent)}"
        return Advice(group, None, why, tuple(refused.items()))

    least = min(loss.rank for _, loss in fitting.values())
    losing_least = [technique for technique, (_, loss) in fitting.items() if loss.rank == least]
    fastest = min(_seconds(found, group, technique) for technique in losing_least)
    as_fast = [technique for technique in losing_least if _seconds(found, group, technique) <= fastest * _AS_FAST]
    best = min(as_fast, key=lambda technique: fitting[technique][0].at_least_bytes)
    need, loss = fitting[best]
    left = budget_bytes - (need.at_least_bytes if need.at_most_bytes is None else need.at_most_bytes)
    why = f"needs {need}, leaves {format_bytes(left)}; {loss.told}"
    reasons = {name: _worse(found, group, name, best, fitting) for name in fitting if name != best}
    order_of_group = found.techniques(group)
    others = sorted((reasons | refused).items(), key=lambda item: order_of_group.index(item[0]))
    return Advice(group, best, why, tuple(others))


_AS_FAST = 1 + METRIC_OF_FIELD["step_median_s"].same_within


def _seconds(found: Comparison, group: Group, technique: str) -> float:
    """A step's duration; without end where it is not known."""
    seconds = found.value(group, technique, "step_median_s")
    return float("inf") if seconds is None else seconds


def _unfit(found: Comparison, group: Group, technique: str) -> str | None:
    """Why a case cannot be advised whatever the budget."""
    for record in found.repeats(group, technique):
        if record.status != "ok":
            return said_of(record)[0]
    for field in _MUST_BE_KNOWN:
        if found.value(group, technique, field) is None:
            reasons = [record.reasons.get(field) for record in found.repeats(group, technique)]
            reason = next((reason for reason in reasons if reason), "the record does not say why")
            return f"its {METRIC_OF_FIELD[field].title} is not known: {reason}"
    return None


def _need(found: Comparison, group: Group, technique: str) -> _Need | None:
    """The highest of what has to find room."""
    needs = []
    for field in _NEEDED:
        value = found.value(group, technique, field)
        if value is None:
            continue
        how, off = found.repeats(group, technique)[0].obtained.get(field, {}), found.resolution(group, technique, field)
        match how.get("bound"):
            case "at least":
                needs.append(_Need(field, value, how.get("at_most_bytes"), off))
            case "at most":
                needs.append(_Need(field, how.get("at_least_bytes", 0), value, off))
            case _:
                needs.append(_Need(field, value, value, off))
    return max(needs, key=lambda need: (need.at_most_bytes or need.at_least_bytes, need.at_least_bytes), default=None)


def _over(need: _Need, budget_bytes: int) -> str | None:
    if need.at_least_bytes > budget_bytes:
        return f"needs {need}, {format_bytes(need.at_least_bytes - budget_bytes)} too much"
    if need.at_most_bytes is not None and need.at_most_bytes > budget_bytes:
        return f"needs {need}: whether that fits is not known"
    if max(need.at_least_bytes, need.at_most_bytes or 0) + need.off_bytes > budget_bytes:
        return f"needs {need}: too near to tell, the figure is good to {format_bytes(need.off_bytes)}"
    return None


def _loss(found: Comparison, group: Group, technique: str) -> _Loss:
    """A loss; one that chance explains is none."""
    if technique == REFERENCE:
        return _Loss(0.0, 0.0, "it is the reference, and loses nothing")
    points = found.difference(group, technique, "accuracy_percent")
    if points is not None:
        if points >= -SAME_ACCURACY:
            return _Loss(0.0, 0.0, "loses no accuracy beyond chance")
        return _Loss(-points, -points, f"loses {-points:.1f} percentage points of accuracy")
    kept = found.value(group, technique, "corpus_kept_percent") if found.reads_only(group) else None
    if kept is not None and kept < 100:
        return _Loss(100 - kept, 100 - kept, f"leaves out {100 - kept:.3g}% of the text")
    lost, of = found.value(group, technique, "lost_bits_per_byte"), found.value(group, REFERENCE, "bits_per_byte")
    if lost is not None and of:
        error = found.value(group, technique, "lost_bits_per_byte_standard_error") or 0.0
        if lost <= CERTAIN * error:
            return _Loss(0.0, 0.0, "loses no bits per byte beyond chance")
        shown = signed(found, group, technique, METRIC_OF_FIELD["lost_bits_per_byte"])
        percent = lost / of * 100
        return _Loss(percent, percent, f"loses {format_percent(percent)} ({shown} bits/byte)")
    divergence = found.value(group, technique, "kl_nats")
    if divergence is not None:
        told = f"what quality it loses is not known (KL {format_divergence(divergence)} from the reference)"
        return _Loss(None, divergence if divergence > NO_DIVERGENCE else 0.0, told)
    if found.quality_field(group) is None:
        return _Loss(None, 0.0, "no quality was measured here")
    return _Loss(None, float("inf"), "its quality is not known")


def _loses_too_much(loss: _Loss, most_percent: float | None) -> str | None:
    if most_percent is None:
        return None
    if loss.percent is None:
        return f"fits, but {loss.told}"
    return f"fits, but {loss.told}, more than {format_percent(most_percent)}" if loss.percent > most_percent else None


def _worse(found: Comparison, group: Group, technique: str, best: str, fitting: dict[str, tuple[_Need, _Loss]]) -> str:
    """Why one that fits comes after the one that is advised."""
    (need, loss), (_, least) = fitting[technique], fitting[best]
    if loss.rank > least.rank:
        return f"fits ({need}), but {loss.told}"
    slow, fast = (_seconds(found, group, name) for name in (technique, best))
    if slow == float("inf"):
        return f"fits ({need}) and loses as little, but its time is not known"
    if slow <= fast * _AS_FAST:
        return f"fits and loses as little in about the same time, but needs {need}"
    return f"fits ({need}) and loses as little, but takes {format_seconds(slow)} a step, not {format_seconds(fast)}"
