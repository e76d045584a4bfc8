"""Records beside each other: ratios to the reference, what each member of a stack adds, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from membench.record import METRIC_OF_FIELD, REFERENCE, Record

Group = tuple[str, str, str]

_OF_THE_REFERENCE = {"lost_bits_per_byte": 0.0, "kl_nats": 0.0, "top1_agreement_percent": 100.0}
"""How far the reference is from itself: it has no such figure."""


class Comparison:
    """Records by case, in the order in which they were measured, each group's reference first.

    A case's figure is the median over its repeats.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._cases: dict[tuple[Group, str], list[Record]] = {}
        for record in records:
            self._cases.setdefault((record.group, record.technique), []).append(record)

    @property
    def groups(self) -> list[Group]:
        """(model, workload, device) of the cases."""
        return list(dict.fromkeys(group for group, _ in self._cases))

    def techniques(self, group: Group) -> list[str]:
        """The stacks measured in a group, the reference first, each member before the stacks it is in."""
        found = [technique for own, technique in self._cases if own == group]
        return sorted(found, key=lambda technique: (technique != REFERENCE, "+" in technique))

    def repeats(self, group: Group, technique: str) -> list[Record]:
        """A case's records; none if it was not measured."""
        return self._cases.get((group, technique), [])

    def value(self, group: Group, technique: str, field: str) -> float | None:
        """A metric of a case; ``None`` if no repeat has it."""
        values = [v for record in self.repeats(group, technique) if (v := record.metrics.get(field)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """A metric over that of another case of the group."""
        value, of = self.value(group, technique, field), self.value(group, base, field)
        return value / of if METRIC_OF_FIELD[field].has_ratio and value is not None and of else None

    def difference(self, group: Group, technique: str, field: str, base: str = REFERENCE) -> float | None:
        """A metric less that of another case."""
        value, of = (
            _OF_THE_REFERENCE[field]
            if name == REFERENCE and field in _OF_THE_REFERENCE
            else self.value(group, name, field)
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

    def front(self, group: Group) -> set[str]:
        """The techniques that no other one beats or equals in all that counts at once, and beats in one.

        What counts: live memory, time, quality, and the size of the training data where the workload reads some.
        Quality is accuracy where it is known, else the loss in bits per byte where the model is trained, else the
        divergence from the reference; where none is known it does not count.
        """
        techniques = self.techniques(group)

        def is_known(field: str) -> bool:
            return any(self.value(group, technique, field) is not None for technique in techniques)

        fields = ["peak_live_bytes", "step_median_s", *(["data_bytes"] if is_known("data_bytes") else [])]
        quality = next(filter(is_known, ("accuracy_percent", "lost_bits_per_byte", "kl_nats")), None)
        scores: dict[str, tuple[float, ...]] = {}
        for technique in techniques:
            if any(record.status != "ok" for record in self.repeats(group, technique)):
                continue
            values = [self.value(group, technique, field) for field in fields]
            if quality is not None:
                worse = self.difference(group, technique, quality)
                values.append(None if worse is None else -worse if quality == "accuracy_percent" else worse)
            known = tuple(value for value in values if value is not None)
            if len(known) == len(values):
                scores[technique] = known
        return {
            technique
            for technique, score in scores.items()
            if not any(_beats(other, score) for name, other in scores.items() if name != technique)
        }


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


def _beats(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))
