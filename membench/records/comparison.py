"""Comparison of records: ratios to the reference, interactions within stacks, and the Pareto front."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from membench.protocol.case import REFERENCE, Group, reference_group
from membench.records.disturbed_times import SHARED, WHY, are_disturbed, median
from membench.records.highest_peak import HIGHEST, LIVE_PEAKS, RUNNING, Peak, highest, peaks_of, with_highest_peak
from membench.records.judged_text import are_of_other_text
from membench.records.metrics import METRIC_OF_FIELD, METRICS
from membench.records.record import Record, metrics_in
from membench.records.references import references_of

QUALITY = tuple(metric.field for metric in METRICS if metric.loss)
"""The fields of the quality metrics, in order of preference."""

_DECIDES = 0.05
"""By so much another phase must exceed the peak of running to decide what is needed."""

_SIGNIFICANT_STANDARD_ERRORS = 2
"""A difference within so many standard errors counts as noise."""


class Comparison:
    """Records grouped by case, in the order in which they were measured, each group's reference first.

    Of cases in ranks, the reference is that of a single device: it is in their group, too, and has a group of its own
    only if other cases of the single device are there.

    The value of a metric of a case is the median over the case's repeats; of a time, over those that other processes
    did not disturb, if there are any.

    Attributes:
        metrics: the built-in metrics and the custom metrics of the records.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._cases: dict[tuple[Group, str], list[Record]] = {}
        # Tables, pages and remarks ask for the same values again and again.
        self._values: dict[tuple[Group, str, str], float | None] = {}
        self._disturbed: dict[tuple[Group, str, str], bool] = {}
        records = [with_highest_peak(record) for record in records]
        for record in records:
            self._cases.setdefault((record.group, record.technique), []).append(record)
        by_group: dict[Group, list[Record]] = {}
        for record in records:
            by_group.setdefault(record.group, []).append(record)
        for group, references in references_of(by_group).items():
            self._cases.setdefault((group, REFERENCE), references)
        self.metrics = metrics_in(records)
        self._techniques: dict[Group, list[str]] = {}
        for group, technique in self._cases:
            self._techniques.setdefault(group, []).append(technique)
        for techniques in self._techniques.values():
            techniques.sort(key=lambda technique: (technique != REFERENCE, "+" in technique))
        self._read_only_groups = {record.group for record in records if record.metrics.get("read_mb_per_s") is not None}
        shown_elsewhere = {reference_group(group) for group in self._techniques if reference_group(group) != group}
        for group in shown_elsewhere:
            if self._techniques.get(group) == [REFERENCE]:
                del self._techniques[group]

    @property
    def groups(self) -> list[Group]:
        """Return the groups of the cases: (model, workload, device)."""
        return list(self._techniques)

    def techniques(self, group: Group) -> list[str]:
        """Return the stacks measured in a group: the reference first, single techniques before stacks."""
        return list(self._techniques.get(group, ()))

    def repeats(self, group: Group, technique: str) -> list[Record]:
        """Return the records of a case; empty if it was not measured."""
        return self._cases.get((group, technique), [])

    def title(self, group: Group, technique: str) -> str:
        """Return the name of a case within its group: the technique, and the device if it is another one."""
        devices = {record.case["device"] for record in self.repeats(group, technique)} - {group[2]}
        return f"{technique} ({devices.pop()})" if devices else technique

    def within(self, group: Group, stack: str) -> Comparison:
        """Return the comparison in which the parts of a stack are cases of its group, wherever they ran."""
        elsewhere = {part: of for record in self.repeats(group, stack) for part, of in record.part_groups.items()}
        if not elsewhere:
            return self
        found = copy.copy(self)
        found._values, found._disturbed = {}, {}
        found._cases = {**self._cases, **{(group, part): self.repeats(of, part) for part, of in elsewhere.items()}}
        return found

    def value(self, group: Group, technique: str, field: str) -> float | None:
        """Return the value of a metric of a case; ``None`` if no repeat has it.

        Quality metrics are also ``None`` in groups whose workload only reads data.
        """
        key = (group, technique, field)
        if key not in self._values:
            is_left_out = METRIC_OF_FIELD[field].learnt and self.reads_only(group)
            self._values[key] = None if is_left_out else median(self.repeats(group, technique), field)
        return self._values[key]

    def is_disturbed(self, group: Group, field: str, *techniques: str) -> bool:
        """Whether the value of any of these cases is a time that other processes disturbed."""
        return any(self._is_disturbed(group, technique, field) for technique in techniques)

    def _is_disturbed(self, group: Group, technique: str, field: str) -> bool:
        key = (group, technique, field)
        if key not in self._disturbed:
            self._disturbed[key] = are_disturbed(self.repeats(group, technique), field)
        return self._disturbed[key]

    def why_untold(self, group: Group, field: str, *techniques: str) -> str | None:
        """Return why nothing follows from the value of any of these cases, because it is a time; else ``None``.

        Other processes disturbed it, or several ranks share one machine's cores, so that it is not a cluster's.
        """
        if METRIC_OF_FIELD[field].depends_on != "time":
            return None
        if self.is_disturbed(group, field, *techniques):
            return WHY
        records = [record for technique in techniques for record in self.repeats(group, technique)]
        known = (record for record in records if record.metrics.get(field) is not None)
        return SHARED if any(record.device.shares_cores for record in known) else None

    def is_untold(self, group: Group, field: str, *techniques: str) -> bool:
        """Whether nothing follows from the value of any of these cases, because it is a time."""
        return self.why_untold(group, field, *techniques) is not None

    def reads_other_text(self, record: Record) -> bool:
        """Whether a record was measured on a text other than the reference's, because the files changed in between."""
        own = {process.corpus for process in record.processes if process.corpus}
        of_reference = {
            process.corpus
            for reference in self.repeats(record.group, REFERENCE)
            for process in reference.processes
            if process.corpus
        }
        return bool(own and of_reference and own != of_reference)

    def reads_only(self, group: Group) -> bool:
        """Whether a group's workload only reads data, without training or running a model on them."""
        return group in self._read_only_groups

    def is_known(self, group: Group, field: str) -> bool:
        """Whether any case of a group has a value of a metric."""
        return any(self.value(group, technique, field) is not None for technique in self.techniques(group))

    def resolution(self, group: Group, technique: str, field: str) -> float:
        """Return the measurement error of the source of a case's value, in bytes; 0 if it is not stated.

        Of an estimate whose bounds are known it is the distance to the farther one.
        """
        record = self.repeats(group, technique)[0]
        how, value = record.obtained.get(field, {}), record.metrics.get(field)
        found: float = how.get("resolution_bytes", 0)
        if how.get("bound") == "about" and how.get("at_most_bytes") is not None and value is not None:
            found = max(found, how["at_most_bytes"] - value, value - (how.get("at_least_bytes") or 0))
        return found

    def is_within_error(self, group: Group, technique: str, base: str, field: str) -> bool:
        """Return whether two values differ by less than the errors of both, or than one as an estimate may be off.

        Estimates of two cases are made alike, so what they are off by is not added up.
        """
        values = [self.value(group, name, field) for name in (technique, base)]
        if values[0] is None or values[1] is None:
            return False
        how = [self.repeats(group, name)[0].obtained.get(field, {}) for name in (technique, base)]
        off = max(each.get("off_bytes") or 0 for each in how)
        errors = sum(self.resolution(group, name, field) for name in (technique, base))
        return abs(values[0] - values[1]) < max(off, errors)

    def ratio(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """Return the ratio of a case's value to that of another case of the group; ``None`` if it is undefined."""
        if are_of_other_text(field, self.repeats(group, technique), self.repeats(group, base)):
            return None
        value, of_base = self.value(group, technique, field), self.value(group, base, field)
        return value / of_base if METRIC_OF_FIELD[field].has_ratio and value is not None and of_base else None

    def difference(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """Return a case's value minus that of another case of the group; ``None`` if one of them is not known."""
        if are_of_other_text(field, self.repeats(group, technique), self.repeats(group, base)):
            return None
        # If the metric is a distance from the reference, the reference's own value is not measured but given.
        of_reference = METRIC_OF_FIELD[field].of_reference
        value, of_base = (
            of_reference if name == REFERENCE and of_reference is not None else self.value(group, name, field)
            for name in (technique, base)
        )
        return None if value is None or of_base is None else value - of_base

    def interaction(self, group: Group, stack: str, field: str) -> float | None:
        """Return a stack's ratio divided by the product of its members' ratios; ``None`` if one is not known.

        For metrics of which less is better, a result above one means that the members impede each other.
        """
        whole = self.ratio(group, stack, field)
        parts = self.within(group, stack)
        alone = [parts.ratio(group, member, field) for member in stack.split("+")]
        if whole is None or None in alone:
            return None
        return whole / math.prod(ratio for ratio in alone if ratio is not None)

    def quality_field(self, group: Group) -> str | None:
        """Return the quality metric of a group: accuracy, else the loss in bits per byte, else the divergence.

        ``None`` if none is known, or if the workload only reads data, because then no model learns from them.
        """
        return next(filter(functools.partial(self.is_known, group), QUALITY), None)

    def speed_field(self, group: Group) -> str:
        """Return the speed metric of a group: tokens per second if its steps process tokens, else the step time.

        The step time would credit techniques that shorten the text, or pad rows, for doing less work.
        """
        return "tokens_per_s" if self.is_known(group, "tokens_per_s") else "step_median_s"

    def pace_s(self, group: Group, technique: str) -> float | None:
        """Return the seconds per token, or per step if steps process no tokens; ``None`` if they tell nothing."""
        field = self.speed_field(group)
        if self.is_untold(group, field, technique):
            return None
        value = self.value(group, technique, field)
        if field == "step_median_s":
            return value
        return 1 / value if value else None

    def lost(self, group: Group, technique: str, field: str) -> float | None:
        """Return the quality loss of a case against the reference; negative if it is better.

        The loss is 0 if noise can explain it. It is also 0 for a gain in bits per byte after training, because the
        standard error covers the sampling of the text and not the randomness of training.
        """
        difference = self.difference(group, technique, field)
        if difference is None:
            return None
        metric = METRIC_OF_FIELD[field]
        if metric.better == "higher":
            difference = -difference
        is_chance = abs(difference) <= self.error(group, technique, field)
        trains = metric.gains_by_chance and self.value(group, technique, "final_loss_nats") is not None
        return 0.0 if is_chance or (trains and difference < 0) else difference

    def error(self, group: Group, technique: str, field: str) -> float:
        """Return the largest difference of a quality metric that noise can explain."""
        loss = METRIC_OF_FIELD[field].loss
        if loss is None:
            return 0.0
        if loss.error_field is None:
            return loss.chance
        return _SIGNIFICANT_STANDARD_ERRORS * (self.value(group, technique, loss.error_field) or 0.0)

    def highest_peak(self, group: Group, technique: str, *others: str) -> Peak | None:
        """Return the highest live peak of a case's phases, in the repeat that needs the most; ``None`` if unknown.

        Args:
            others: fields of peaks that are not live ones and count, too.
        """
        repeats = self.repeats(group, technique)
        return highest([p for r in repeats for p in peaks_of(r.metrics, r.obtained, (*others, *LIVE_PEAKS))])

    def needed_before(self, group: Group, technique: str) -> Peak | None:
        """Return the highest peak of a technique if it decides: if it surely is more than the reference ever needs.

        ``None`` also if it is the peak of running, which is looked at anyway, or hardly more than that.
        """
        peak, of_reference = self.highest_peak(group, technique), self.highest_peak(group, REFERENCE)
        if peak is None or of_reference is None or of_reference.at_most_bytes is None or peak.field == RUNNING:
            return None
        running_bytes = self.value(group, technique, RUNNING) or 0.0
        needed_bytes = max(
            of_reference.at_most_bytes + peak.off_bytes + of_reference.off_bytes, running_bytes * (1 + _DECIDES)
        )
        return peak if peak.at_least_bytes > needed_bytes else None

    def needs_more_in(self, group: Group, technique: str, field: str) -> bool:
        """Whether a technique needs more than the reference ever does, and at this live peak."""
        peak = self.needed_before(group, technique)
        return peak is not None and peak.field == field

    def front(self, group: Group, peak: str = HIGHEST) -> set[str]:
        """Return the techniques on the Pareto front.

        No other technique is at least as good as these in all criteria and better in one.
        The criteria are live memory (the highest peak of all phases, or that of running), speed, quality,
        and the size of the training data if the workload reads some.
        If the workload only reads data, the share of the text that is kept replaces quality; if no quality is known,
        it is not a criterion. Two values tie when they differ by less than run-to-run variation: the metric's
        ``same_within``, the resolution of the source, or two standard errors of a loss. A speed that other processes
        disturbed, or of ranks that share one machine's cores, ties with any other.

        Args:
            peak: the field of the live peak that counts.
        """
        if not self.is_known(group, peak):
            peak = RUNNING
        techniques = self.techniques(group)

        is_known = functools.partial(self.is_known, group)
        quality = self.quality_field(group)
        fields = [peak, self.speed_field(group), *filter(is_known, ["data_bytes"])]
        fields += [quality] if quality else list(filter(is_known, ["corpus_kept_percent"]))
        scores: dict[str, tuple[_Score, ...]] = {}
        for technique in techniques:
            if any(record.status != "ok" for record in self.repeats(group, technique)):
                continue
            found = [self._score(group, technique, field) for field in fields]
            known = tuple(score for score in found if score is not None)
            if len(known) == len(found):
                scores[technique] = known
        return {
            technique
            for technique, score in scores.items()
            if not any(_beats(other, score) for name, other in scores.items() if name != technique)
        }

    def _score(self, group: Group, technique: str, field: str) -> _Score | None:
        """Return a case's score by a criterion, less being better; ``None`` if it is not known."""
        metric = METRIC_OF_FIELD[field]
        if metric.of_reference is not None:
            value = self.difference(group, technique, field)
            return None if value is None else _Score(value, self.error(group, technique, field))
        value = self.value(group, technique, field)
        if value is None and field == HIGHEST:
            return self._score(group, technique, RUNNING)
        if field == "corpus_kept_percent":
            return _Score(-(100.0 if value is None else value), 0.0)
        if value is None:
            return None
        if self.is_untold(group, field, technique):
            off = math.inf
        elif metric.loss is not None:
            off = self.error(group, technique, field)
        else:
            off = max(metric.same_within * value, self.resolution(group, technique, field))
        return _Score(value if metric.better == "lower" else -value, off)


class _Score(NamedTuple):
    value: float
    off: float
    """The difference within which two values tie."""


def prefixes(stack: str) -> list[str]:
    """Return the prefixes of a stack, itself included: ``a``, ``a+b`` and ``a+b+c`` for ``a+b+c``."""
    members = stack.split("+")
    return ["+".join(members[: count + 1]) for count in range(len(members))]


def with_compared(records: Sequence[Record], kept: Sequence[Record]) -> tuple[Record, ...]:
    """Return the kept records and those they are compared with: references, and prefixes and members of stacks.

    The records stay in their order.
    """
    wanted = {(record.reference_group, REFERENCE) for record in kept}
    for record in kept:
        names = (*prefixes(record.technique), *record.technique.split("+"))
        wanted |= {(record.part_groups.get(name, record.group), name) for name in names}
    return tuple(record for record in records if (record.group, record.technique) in wanted)


def _beats(first: tuple[_Score, ...], second: tuple[_Score, ...]) -> bool:
    """Whether the first is worse than the second in no criterion and better in at least one; ties are neither."""
    ahead = [b.value - a.value for a, b in zip(first, second, strict=True)]
    off = [max(a.off, b.off) for a, b in zip(first, second, strict=True)]
    return all(by >= -tolerance for by, tolerance in zip(ahead, off, strict=True)) and any(
        by > tolerance for by, tolerance in zip(ahead, off, strict=True)
    )
