"""How far apart runs of the same case are on one machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict

from membench.record import Record

_DEVIATIONS = 3.0

_RANGE_OF_DEVIATIONS = (
    1.128, 1.693, 2.059, 2.326, 2.534, 2.704, 2.847, 2.970, 3.078, 3.173, 3.258, 3.336, 3.407, 3.472, 3.532, 3.588,
    3.640, 3.689, 3.735,
)  # fmt: skip
"""How many standard deviations the range of 2, 3, … 20 normal values spans on average: d2 of control charts (Tippett,
Biometrika 17, 1925)."""


@dataclass(frozen=True)
class Spread:
    """What repeats of the same case showed of one figure.

    Attributes:
        runs: how many there were, two at least.
        range: the highest less the lowest, in the figure's unit.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    runs: int
    range: int | float

    @property
    def floor(self) -> float:
        """How far apart two runs of this case may be found by chance: three standard deviations of a difference.

        The standard deviation of single runs is estimated from their range.
        """
        spanned = _RANGE_OF_DEVIATIONS[min(self.runs, len(_RANGE_OF_DEVIATIONS) + 1) - 2]
        return _DEVIATIONS * math.sqrt(2) * self.range / spanned


@dataclass(frozen=True)
class Noise:
    """The spreads of a machine, by case id and metric field. Empty: nothing is known of it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    spreads: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)

    @classmethod
    def of_records(cls, records: Sequence[Record]) -> Noise:
        """From A/A repeats: records of one run with repeats, or of several runs of one suite on one machine."""
        values: dict[str, dict[str, list[float]]] = {}
        for record in records:
            if record.status == "ok":
                for name, value in record.metrics.items():
                    if value is not None:
                        values.setdefault(record.id, {}).setdefault(name, []).append(value)
        return cls.of_values(values)

    @classmethod
    def of_values(cls, values: Mapping[str, Mapping[str, Sequence[float]]]) -> Noise:
        """From the figures of A/A repeats, by case id and metric field; a single one shows nothing."""
        spreads = {
            case_id: {
                name: Spread(len(repeats), max(repeats) - min(repeats))
                for name, repeats in of_case.items()
                if len(repeats) > 1
            }
            for case_id, of_case in values.items()
        }
        return cls({case_id: of_case for case_id, of_case in spreads.items() if of_case})

    def floor(self, case_id: str, field: str) -> float:
        """Below which a difference means nothing; 0 where nothing is known."""
        spread = self.spreads.get(case_id, {}).get(field)
        return 0.0 if spread is None else spread.floor

    def __or__(self, other: Noise) -> Noise:
        """Both; where both know a spread, that of the larger floor."""
        merged: dict[str, dict[str, Spread]] = {}
        for case_id, name, spread in (*self._all(), *other._all()):
            of_case = merged.setdefault(case_id, {})
            of_case[name] = max(spread, of_case.get(name, spread), key=lambda one: one.floor)
        return Noise(merged)

    def _all(self) -> Iterable[tuple[str, str, Spread]]:
        return (
            (case_id, name, spread) for case_id, of_case in self.spreads.items() for name, spread in of_case.items()
        )
