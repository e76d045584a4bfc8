"""Records beside each other: ratios to the reference, what each member of a stack adds, and the Pareto front."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from membench.protocol.case import REFERENCE
from membench.records.metrics import METRIC_OF_FIELD, METRICS
from membench.records.record import Record, metrics_in

Group = tuple[str, str, str]

QUALITY = tuple(metric.field for metric in METRICS if metric.loss)
"""What tells quality, the first that is known before all others."""

CERTAIN = 2
"""Standard errors below which a loss cannot be told from chance."""


class Comparison:
    """Records by case, in the order in which they were measured, each group's reference first.

    A case's figure is the median over its repeats. ``metrics`` are the built-in ones and the records' own.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._cases: dict[tuple[Group, str], list[Record]] = {}
        for record in records:
            self._cases.setdefault((record.group, record.technique), []).append(record)
        self.metrics = metrics_in(records)
        self._techniques: dict[Group, list[str]] = {}
        for group, technique in self._cases:
            self._techniques.setdefault(group, []).append(technique)
        for techniques in self._techniques.values():
            techniques.sort(key=lambda technique: (technique != REFERENCE, "+" in technique))
        self._reading = {record.group for record in records if record.metrics.get("read_mb_per_s") is not None}

    @property
    def groups(self) -> list[Group]:
        """(model, workload, device) of the cases."""
        return list(self._techniques)

    def techniques(self, group: Group) -> list[str]:
        """The stacks measured in a group, the reference first, each member before the stacks it is in."""
        return list(self._techniques.get(group, ()))

    def repeats(self, group: Group, technique: str) -> list[Record]:
        """A case's records; none if it was not measured."""
        return self._cases.get((group, technique), [])

    def value(self, group: Group, technique: str, field: str) -> float | None:
        """A metric of a case; ``None`` if no repeat has it, and of quality where data are only read."""
        if METRIC_OF_FIELD[field].learnt and self.reads_only(group):
            return None
        values = [v for record in self.repeats(group, technique) if (v := record.metrics.get(field)) is not None]
        return statistics.median(values) if values else None

    def reads_other_text(self, record: Record) -> bool:
        """Whether a record says that its text was not the reference's: a folder has changed between the two."""
        own = {process.corpus for process in record.processes if process.corpus}
        of = {
            process.corpus
            for reference in self.repeats(record.group, REFERENCE)
            for process in reference.processes
            if process.corpus
        }
        return bool(own and of and own != of)

    def reads_only(self, group: Group) -> bool:
        """Whether a group's workload reads data, and does nothing with them."""
        return group in self._reading

    def is_known(self, group: Group, field: str) -> bool:
        """Whether any case of the group has a metric."""
        return any(self.value(group, technique, field) is not None for technique in self.techniques(group))

    def resolution(self, group: Group, technique: str, field: str) -> float:
        """How far off the source of a case's figure may be; 0 where that is not stated."""
        obtained = self.repeats(group, technique)[0].obtained
        found: float = obtained.get(field, {}).get("resolution_bytes", 0)
        return found

    def ratio(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """A metric over that of another case of the group."""
        value, of = self.value(group, technique, field), self.value(group, base, field)
        return value / of if METRIC_OF_FIELD[field].has_ratio and value is not None and of else None

    def difference(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """A metric less that of another case."""
        # The reference has no figure of its own where the metric is a distance from it.
        of_reference = METRIC_OF_FIELD[field].of_reference
        value, of = (
            of_reference if name == REFERENCE and of_reference is not None else self.value(group, name, field)
            for name in (technique, base)
        )
        return None if value is None or of is None else value - of

    def interaction(self, group: Group, stack: str, field: str) -> float | None:
        """A stack's ratio over the product of what its members reach alone: above one they get in each other's way."""
        whole = self.ratio(group, stack, field)
        alone = [self.ratio(group, member, field) for member in stack.split("+")]
        if whole is None or None in alone:
            return None
        return whole / math.prod(ratio for ratio in alone if ratio is not None)

    def quality_field(self, group: Group) -> str | None:
        """The metric that tells a group's quality: accuracy, else the loss in bits per byte, else the divergence.

        ``None`` where none is known, and where data are only read: no module has learnt from them.
        """
        return next(filter(functools.partial(self.is_known, group), QUALITY), None)

    def speed_field(self, group: Group) -> str:
        """The metric that tells a group's speed: tokens where its steps have some, else steps.

        An epoch of less text is no faster for having less to do, nor is a step whose rows are padding.
        """
        return "tokens_per_s" if self.is_known(group, "tokens_per_s") else "step_median_s"

    def pace_s(self, group: Group, technique: str) -> float | None:
        """Seconds a token, or a step where the group's steps have no tokens; ``None`` if that is not known."""
        field = self.speed_field(group)
        value = self.value(group, technique, field)
        if field == "step_median_s":
            return value
        return 1 / value if value else None

    def lost(self, group: Group, technique: str, field: str) -> float | None:
        """How much worse than the reference a case is by a metric of quality; below zero it is better.

        Zero is what cannot be told from none: what chance explains, and in a training a gain of bits per byte, because
        its standard error is of the text and not of the training.
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
        """How much of a difference by a metric of quality chance may explain."""
        loss = METRIC_OF_FIELD[field].loss
        if loss is None:
            return 0.0
        if loss.error_field is None:
            return loss.chance
        return CERTAIN * (self.value(group, technique, loss.error_field) or 0.0)

    def front(self, group: Group) -> set[str]:
        """The techniques that no other one beats: is as good as in all that counts, and better in something.

        What counts: live memory, speed, quality, and the size of the training data where the workload reads some.
        Where data are only read, how much of the text is kept stands for quality; where none is known it does not
        count. As good is what runs of the same case may differ by: a share of the metric's own, a figure's resolution,
        two standard errors of a loss.
        """
        techniques = self.techniques(group)

        is_known = functools.partial(self.is_known, group)
        quality = self.quality_field(group)
        fields = ["peak_live_bytes", self.speed_field(group), *filter(is_known, ["data_bytes"])]
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
        """A figure of which less is better, and how much of a difference to it is none."""
        metric = METRIC_OF_FIELD[field]
        if metric.of_reference is not None:
            value = self.difference(group, technique, field)
            return None if value is None else _Score(value, self.error(group, technique, field))
        value = self.value(group, technique, field)
        if field == "corpus_kept_percent":
            return _Score(-(100.0 if value is None else value), 0.0)
        if value is None:
            return None
        if metric.loss is not None:
            off = self.error(group, technique, field)
        else:
            off = max(metric.same_within * value, self.resolution(group, technique, field))
        return _Score(value if metric.better == "lower" else -value, off)


class _Score(NamedTuple):
    value: float
    off: float
    """How far two such figures may be apart and still be the same."""


def prefixes(stack: str) -> list[str]:
    """``a+b+c``: ``a``, ``a+b``, ``a+b+c``."""
    members = stack.split("+")
    return ["+".join(members[: count + 1]) for count in range(len(members))]


def with_compared(records: Sequence[Record], kept: Sequence[Record]) -> tuple[Record, ...]:
    """The kept records and those that their ratios and the rows of their stacks are made of, in their order."""
    wanted = {
        (record.group, name)
        for record in kept
        for name in (record.technique, REFERENCE, *prefixes(record.technique), *record.technique.split("+"))
    }
    return tuple(record for record in records if (record.group, record.technique) in wanted)


def _beats(first: tuple[_Score, ...], second: tuple[_Score, ...]) -> bool:
    """Whether the first is nowhere worse than the second, and somewhere better, by more than either may be off."""
    ahead = [b.value - a.value for a, b in zip(first, second, strict=True)]
    off = [max(a.off, b.off) for a, b in zip(first, second, strict=True)]
    return all(by >= -tolerance for by, tolerance in zip(ahead, off, strict=True)) and any(
        by > tolerance for by, tolerance in zip(ahead, off, strict=True)
    )
