"""A run in plain words: sentences computed from its records, and no more than they carry."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import QUALITY, Comparison
from membench.records.metrics import METRIC_OF_FIELD, NO_DIVERGENCE, SAME_ACCURACY
from membench.records.record import Record
from membench.records.run_file import Run
from membench.regression.measured import CommitMeasured
from membench.report.broken_rules import idle_limits, troubled_gates
from membench.report.cells import bound_of_ratio, is_coarse, signed
from membench.report.outcomes import end_of
from membench.report.savings import Ratio, ratios_of
from membench.units import format_bytes, format_divergence, format_percent

_NEAR = 0.1
"""Below this a change is told in percent: '6% less' says more than '1.1 times less'."""

_AS_SMALL = 0.05
"""Of techniques as small as this within each other the fastest is named."""

HOW_TO_READ = (
    f"Of techniques that need as little within {_AS_SMALL:.0%}, the fastest is named. Times marked '~' say nothing:"
    " other processes used the cores, or ranks share those of one machine. 'Chance' is two standard errors"
    " of the difference over held-out text. Where only the divergence of the logits is known, quality itself is not."
)


class Highlight(NamedTuple):
    """What is to be said of a model, workload and device; of one technique, or of all where none is named."""

    group: Group
    technique: str | None
    text: str

    def __str__(self) -> str:
        return f"{' · '.join(self.group)}: {self.technique + ' ' if self.technique else ''}{self.text}"


def overview(run: Run) -> str:
    """What was run, how it ended, when and where."""
    machine = run.header.get("machine", {})
    how = f"{_counted(len(run.records), 'case')}, {_ends(run)}" if run.records else "no case was finished"
    where = [
        machine.get("processor"),
        _counted(machine["cores"], "core") if machine.get("cores") else None,
        f"{format_bytes(machine['memory_bytes'])} of memory" if machine.get("memory_bytes") else None,
        *(gpu.get("name") for gpu in machine.get("gpus") or () if isinstance(gpu, dict)),
        f"code at commit {code}" if (code := code_of(run)) else None,
        f"membench at commit {machine['commit']}" if machine.get("commit") else None,
    ]
    place, began = ", ".join(str(part) for part in where if part), started(run)
    measured = f" Measured{f' {began}' if began else ''}{f' on {place}' if place else ''}." if began or place else ""
    return f"Suite {run.header.get('suite')}: {how}.{measured}"


def _ends(run: Run) -> str:
    """How the cases ended, and what was asked of them that is broken or was not checked."""
    gates = troubled_gates(run)
    broken = sum(outcome.holds is False for outcome in gates)
    unchecked = len(gates) - broken + sum(len(record.unchecked_limits) for record in run.records)
    unchecked += len(idle_limits(run))
    ends = collections.Counter(map(end_of, run.records))
    if ends.keys() == {"ok"} and not gates and not unchecked:
        return "all ok"
    told = [f"{number} {end}" for end, number in ends.items()]
    told += [f"{_counted(broken, 'gate')} broken"] if broken else []
    told += [f"{_counted(unchecked, 'limit or gate', 'limits and gates')} not checked"] if unchecked else []
    return ", ".join(told)


def code_of(run: Run) -> str | None:
    """Name the commit of the code under test, with '-dirty' as git does if files differ; ``None`` if it is unknown."""
    found = CommitMeasured.of(run)
    return str(found) if found else None


def started(run: Run) -> str:
    """When a run began, to the minute, as its header says; nothing where it does not."""
    try:
        return f"{datetime.fromisoformat(run.header.get('started_at', '')):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError):
        return ""


def highlights(records: Sequence[Record]) -> list[Highlight]:
    """Of each model, workload and device: what needs the least without a loss, and what needs the least at all."""
    found = Comparison(records)
    lines = []
    for group in found.groups:
        measured = _measured(found, group)
        told = [technique for technique in measured if technique != REFERENCE]
        if not told:
            continue
        if REFERENCE not in measured:
            lines.append(Highlight(group, None, f"nothing to compare with: '{REFERENCE}' was not measured to its end."))
            continue
        is_of_data = any(_is_smaller(found, group, technique, "data_bytes") for technique in told)
        field = "data_bytes" if is_of_data else "peak_live_bytes"
        smaller = [technique for technique in told if _is_smaller(found, group, technique, field)]
        if not smaller:
            what = METRIC_OF_FIELD[field].title
            lowers = (
                "lowers" if all(_is_told(found, group, technique, field) for technique in told) else "surely lowers"
            )
            lines.append(
                Highlight(group, None, f"no technique {lowers} the {what} by more than runs of a case differ.")
            )
            continue
        free = [technique for technique in smaller if _loses_nothing(found, group, technique)]
        chosen = dict.fromkeys(
            _fastest_of_the_smallest(found, group, names, field) for names in (free, smaller) if names
        )
        lines += [Highlight(group, technique, sentence(found, group, technique)) for technique in chosen]
    return lines


def sentence(found: Comparison, group: Group, technique: str) -> str:
    """What a technique holds, loses and takes against the reference, in one case; its name is to stand before."""
    held = [
        _size(found, group, technique, "data_bytes", "training data"),
        _size(found, group, technique, "peak_live_bytes", "live memory at its peak"),
        _size(found, group, technique, "total_peak_live_bytes", "live memory over all ranks"),
    ]
    amounts = " and ".join(amount for amount in held if amount) or "an amount of memory that is not known"
    if (before := found.needed_before(group, technique)) is not None:
        amounts += f" while running, but needs {before}, more than the reference ever does"
    return f"holds {amounts}{_loss(found, group, technique)}{_time(found, group, technique)}."


def _measured(found: Comparison, group: Group) -> list[str]:
    return [
        technique
        for technique in found.techniques(group)
        if all(record.status == "ok" for record in found.repeats(group, technique))
    ]


def _fastest_of_the_smallest(found: Comparison, group: Group, techniques: Sequence[str], field: str) -> str:
    def size(technique: str) -> float:
        return found.value(group, technique, field) or 0.0

    least = min(map(size, techniques))
    near = [technique for technique in techniques if size(technique) <= least * (1 + _AS_SMALL)]
    if found.is_untold(group, found.speed_field(group), *near):
        return min(near, key=size)
    return min(near, key=lambda technique: (found.pace_s(group, technique) or float("inf"), size(technique)))


def _ratio(found: Comparison, group: Group, technique: str, field: str) -> Ratio | None:
    return next(iter(ratios_of(found, [group], technique, METRIC_OF_FIELD[field])), None)


def _is_smaller(found: Comparison, group: Group, technique: str, field: str) -> bool:
    ratio = _ratio(found, group, technique, field)
    return ratio is not None and ratio.tells and ratio.value < 1


def _is_told(found: Comparison, group: Group, technique: str, field: str) -> bool:
    """Whether a figure is known beside the reference's, and by more than a bound that leaves open which is smaller."""
    ratio = _ratio(found, group, technique, field)
    if ratio is None:
        return False
    bound = bound_of_ratio(found, group, technique, METRIC_OF_FIELD[field], REFERENCE)
    return not bound or (bound == "≥" and ratio.value >= 1)


def _size(found: Comparison, group: Group, technique: str, field: str, what: str) -> str:
    """How much less or more: '2.9 times less training data (7.0 MiB, not 20 MiB)'; nothing if it is not known."""
    ratio, metric = _ratio(found, group, technique, field), METRIC_OF_FIELD[field]
    if ratio is None:
        return ""
    bound = bound_of_ratio(found, group, technique, metric, REFERENCE)
    if not ratio.tells:
        return f"an amount of {what} of which only a bound is known" if bound else f"as much {what}"
    is_less = ratio.value < 1
    times = 1 / ratio.value if is_less else ratio.value
    if times > 1 + _NEAR:
        amount = f"{times:.1f} times {'less' if is_less else 'as much'}"
    else:
        amount = f"{abs(ratio.value - 1):.0%} {'less' if is_less else 'more'}"
    if bound:
        # Of a figure that is at most so high the saving is at least so large.
        sure = "at least " if (bound == "≤") is is_less else "at most "
    else:
        sure = "about " if any(is_coarse(found, group, name, metric) for name in (technique, REFERENCE)) else ""
    own, of = (signed(found, group, name, metric) for name in (technique, REFERENCE))
    return f"{sure}{amount} {what} ({own}, not {of})"


def _loses_nothing(found: Comparison, group: Group, technique: str) -> bool:
    """Whether a loss of quality was looked for and none found that is more than chance."""
    if found.reads_only(group):
        return found.value(group, technique, "corpus_kept_percent") in (None, 100.0)
    losses = (found.lost(group, technique, field) for field in QUALITY)
    loss = next((loss for loss in losses if loss is not None), None)
    return loss is not None and loss <= 0


def _loss(found: Comparison, group: Group, technique: str) -> str:
    points, bits, divergence = (
        found.lost(group, technique, field) for field in ("accuracy_percent", "lost_bits_per_byte", "kl_nats")
    )
    if points is not None:
        if not points:
            return f", gets as many of the held-out samples right to within {SAME_ACCURACY} percentage points"
        more = "fewer" if points > 0 else "more"
        return f", gets {abs(points):.1f} percentage points {more} of the held-out samples right"
    kept = found.value(group, technique, "corpus_kept_percent") if found.reads_only(group) else None
    if kept is not None:
        return f", with {kept:.3g}% of the text"
    of = found.value(group, REFERENCE, "bits_per_byte")
    if bits is not None and of:
        if not bits:
            return " for no more bits per byte than chance explains"
        return f" for {format_percent(abs(bits / of) * 100)} {'more' if bits > 0 else 'fewer'} bits per byte"
    if divergence is not None:
        if not divergence:
            return f", its logits within {format_divergence(NO_DIVERGENCE)} nats a token of the reference's"
        return f", its logits {format_divergence(divergence)} nats a token from the reference's"
    return ", its quality not measured" if found.quality_field(group) else ""


def _time(found: Comparison, group: Group, technique: str) -> str:
    # Of an epoch that reads less text the time says nothing.
    field, what = ("tokens_per_s", "time a token") if found.reads_only(group) else ("step_median_s", "time")
    ratio = _ratio(found, group, technique, field)
    if ratio is None or not ratio.value:
        return ""
    if (why := found.why_untold(group, field, technique, REFERENCE)) is not None:
        return f", its time not known because {why}"
    times = 1 / ratio.value if found.reads_only(group) else ratio.value
    return f", in {times:.2g} times the {what}" if ratio.tells else f", in about the same {what}"


def _counted(number: int, what: str, several: str | None = None) -> str:
    return f"{number} {what if number == 1 else several or f'{what}s'}"
