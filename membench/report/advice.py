"""Which measured stack fits into a budget of memory and loses least, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from membench.host.device import Device
from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import Comparison
from membench.records.highest_peak import Peak
from membench.records.metrics import METRIC_OF_FIELD, NO_DIVERGENCE
from membench.records.record import Record
from membench.report.cells import signed
from membench.report.outcomes import said_of
from membench.units import format_bytes, format_divergence, format_number, format_percent, format_seconds

_MUST_BE_KNOWN = ("peak_footprint_bytes", "peak_live_bytes")

_HELD_AGAINST = (
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


class _Loss(NamedTuple):
    """What quality a case loses against its reference, in its own kind of figure; and in words."""

    kind: Literal["percent", "divergence", "unknown"]
    amount: float
    off: float
    """How much of it chance may explain."""
    told: str
    measured: float | None = None
    """The amount before chance is left out, where that is another."""

    @property
    def rank(self) -> tuple[int, float]:
        """What is known to be lost stands before what only the logits tell, and that before what nothing tells."""
        return ("percent", "divergence", "unknown").index(self.kind), self.amount

    def is_as_small_as(self, least: _Loss) -> bool:
        return self.kind == least.kind and self.amount - least.amount <= max(self.off, least.off)


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
    yield f"{_HELD_AGAINST} {_on_top(records)}"


def _on_top(records: Sequence[Record]) -> str:
    """What is not in the figures, and what of a GPU is."""
    said = []
    on_cpu = [record for record in records if not _on_gpu(record) and not _includes_interpreter(record)]
    if any(not _on_gpu(record) and _includes_interpreter(record) for record in records):
        said.append("Of a program its interpreter and libraries are in it.")
    if on_cpu:
        taken = [
            process.baseline.resident_bytes
            for record in on_cpu for process in record.processes[:1] if process.baseline
        ]  # fmt: skip
        amount = f": up to {format_bytes(max(taken))} in this run" if taken else ""
        said.append(f"What the interpreter and its libraries take comes on top{amount}.")
    if any(_on_gpu(record) for record in records):
        said.append("Of cases on a GPU it is the GPU's own memory, the CUDA context in the footprint.")
    return " ".join(said)


def _of_group(found: Comparison, group: Group, budget_bytes: int, most_loss_percent: float | None) -> Advice:
    refused: dict[str, str] = {}
    fitting: dict[str, tuple[Peak, _Loss]] = {}
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
        return Advice(group, None, why, tuple((found.title(group, name), said) for name, said in refused.items()))

    least = min((loss for _, loss in fitting.values()), key=lambda loss: loss.rank)
    losing_least = [technique for technique, (_, loss) in fitting.items() if loss.is_as_small_as(least)]
    pace_s = {technique: found.pace_s(group, technique) or float("inf") for technique in fitting}
    fastest_s = min(pace_s[technique] for technique in losing_least)
    as_fast = [technique for technique in losing_least if pace_s[technique] <= fastest_s * _AS_FAST]
    best = min(as_fast, key=lambda technique: fitting[technique][0].highest_bytes)
    why = f"needs {fitting[best][0]}, {_left_of(budget_bytes, fitting[best][0])}; {fitting[best][1].told}"
    for technique, (need, loss) in fitting.items():
        if technique not in losing_least:
            refused[technique] = f"fits ({need}), but {loss.told}"
        elif technique != best:
            refused[technique] = _slower_or_larger(found, group, technique, best, need)
    others = sorted(refused.items(), key=lambda item: found.techniques(group).index(item[0]))
    return Advice(
        group, found.title(group, best), why, tuple((found.title(group, name), said) for name, said in others)
    )


_AS_FAST = 1 + METRIC_OF_FIELD["step_median_s"].same_within


def _slower_or_larger(found: Comparison, group: Group, technique: str, best: str, need: Peak) -> str:
    """Why of two that fit and lose as little the other one is advised."""
    slow_s, fast_s = (found.pace_s(group, name) for name in (technique, best))
    if not slow_s or not fast_s:
        whys = {name: found.why_untold(group, found.speed_field(group), name) for name in (technique, best)}
        why = next((f": {why}" for why in whys.values() if why), "")
        whose = "the advised one's time" if not whys[technique] and whys[best] else "its time"
        return f"fits ({need}) and loses as little, but {whose} is not known{why}"
    if slow_s <= fast_s * _AS_FAST:
        return f"fits and loses as little in about the same time, but needs {need}"
    if found.speed_field(group) == "step_median_s":
        how = f"takes {format_seconds(slow_s)} a step, not {format_seconds(fast_s)}"
    else:
        how = f"does {format_number(1 / slow_s)} tokens/s, not {format_number(1 / fast_s)}"
    return f"fits ({need}) and loses as little, but {how}"


def _unfit(found: Comparison, group: Group, technique: str) -> str | None:
    """Why a case cannot be advised whatever the budget."""
    for record in found.repeats(group, technique):
        if record.status != "ok":
            return said_of(record)[0]
    for field in _MUST_BE_KNOWN:
        for record in found.repeats(group, technique):
            # A program as it is has no live memory that can be told; its footprint holds all of it.
            if field == "peak_live_bytes" and _includes_interpreter(record):
                continue
            if record.metrics.get(field) is None:
                reason = record.reasons.get(field) or "the record does not say why"
                return f"its {METRIC_OF_FIELD[field].title} is not known: {reason}"
    return None


def _on_gpu(record: Record) -> bool:
    return Device.parse(record.case["device"]).on_gpu


def _includes_interpreter(record: Record) -> bool:
    return any(process.includes_interpreter for process in record.processes)


def _need(found: Comparison, group: Group, technique: str) -> Peak | None:
    """What has to find room at one time or another, in the repeat that needs the most."""
    return found.highest_peak(group, technique, "peak_footprint_bytes")


def _left_of(budget_bytes: int, need: Peak) -> str:
    if need.at_most_bytes is None:
        return f"leaves {format_bytes(budget_bytes - need.at_least_bytes)} at most"
    sure = " at least" if need.at_most_bytes > need.at_least_bytes else ""
    return f"leaves {format_bytes(budget_bytes - need.at_most_bytes)}{sure}"


def _over(need: Peak, budget_bytes: int) -> str | None:
    if need.at_least_bytes > budget_bytes:
        return f"needs {need}, {format_bytes(need.at_least_bytes - budget_bytes)} too much"
    if need.at_most_bytes is not None and need.at_most_bytes > budget_bytes:
        return f"needs {need}: whether that fits is not known"
    if need.highest_bytes + need.off_bytes > budget_bytes:
        return f"needs {need}: too near to tell, the figure is good to {format_bytes(need.off_bytes)}"
    return None


def _loss(found: Comparison, group: Group, technique: str) -> _Loss:
    """A loss; one that chance explains is none."""
    if technique == REFERENCE:
        return _Loss("percent", 0.0, 0.0, "it is the reference, and loses nothing")
    points, bits, divergence = (
        found.lost(group, technique, field) for field in ("accuracy_percent", "lost_bits_per_byte", "kl_nats")
    )
    if points is not None:
        told = f"loses {points:.1f} percentage points of accuracy" if points > 0 else "loses no accuracy beyond chance"
        return _Loss("percent", max(points, 0.0), found.error(group, technique, "accuracy_percent"), told)
    kept = found.value(group, technique, "corpus_kept_percent") if found.reads_only(group) else None
    if kept is not None and kept < 100:
        return _Loss("percent", 100 - kept, 0.0, f"leaves out {100 - kept:.3g}% of the text")
    of = found.value(group, REFERENCE, "bits_per_byte")
    if bits is not None and of:
        off = found.error(group, technique, "lost_bits_per_byte") / of * 100
        if bits <= 0:
            # In a training a gain is none: its standard error is not of the training.
            measured = max(found.difference(group, technique, "lost_bits_per_byte") or 0.0, 0.0) / of * 100
            return _Loss("percent", 0.0, off, "loses no bits per byte beyond chance", measured)
        percent, shown = bits / of * 100, signed(found, group, technique, METRIC_OF_FIELD["lost_bits_per_byte"])
        return _Loss("percent", percent, off, f"loses {format_percent(percent)} ({shown} bits/byte)")
    if divergence is not None:
        if divergence <= 0:
            told = f"its logits are within {format_divergence(NO_DIVERGENCE)} nats a token of the reference's"
            return _Loss("percent", 0.0, 0.0, told)
        told = f"what quality it loses is not known (KL {format_divergence(divergence)} from the reference)"
        return _Loss("divergence", divergence, NO_DIVERGENCE, told)
    if found.reads_only(group):
        return _Loss("percent", 0.0, 0.0, "leaves out nothing of the text")
    if found.quality_field(group) is None:
        return _Loss("unknown", 0.0, 0.0, "no quality was measured here")
    return _Loss("unknown", 0.0, 0.0, "its quality is not known")


def _loses_too_much(loss: _Loss, most_percent: float | None) -> str | None:
    if most_percent is None:
        return None
    if loss.kind != "percent":
        return f"fits, but {loss.told}"
    if loss.amount > most_percent:
        if format_percent(loss.amount) == format_percent(most_percent):
            return f"fits, but {loss.told}: {loss.amount:.4g}% is more than {most_percent:.4g}%"
        return f"fits, but {loss.told}, more than {format_percent(most_percent)}"
    highest = (loss.amount if loss.measured is None else loss.measured) + loss.off
    if highest > most_percent:
        return f"fits, but {loss.told}: too near to tell, it may be {format_percent(highest)}"
    return None
