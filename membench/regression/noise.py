"""How far apart runs of the same case are on one machine.

What is known of it is used in two ways, and each figure knows one of them only. Of memory it raises the tolerance: a
change within the noise is none. Of time it is what may happen by chance: a slowdown beyond the tolerance that is within
the noise is not told from chance, and one beyond both is told, however few repeats there are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import ConfigDict

from membench.records.disturbed_times import is_disturbed
from membench.records.record import Record

_DEVIATIONS = 3.0
_LARGEST_EXPONENT = 100.0

_RANGE_OF_DEVIATIONS = (
    1.128, 1.693, 2.059, 2.326, 2.534, 2.704, 2.847, 2.970, 3.078, 3.173, 3.258, 3.336, 3.407, 3.472, 3.532, 3.588,
    3.640, 3.689, 3.735,
)  # fmt: skip
"""How many standard deviations the range of 2, 3, … 20 normal values spans on average: d2 of control charts (Tippett,
Biometrika 17, 1925)."""

RUNS_FOR_TIMES = 5
"""From so many runs on their noise tells a time from chance: of fewer the estimate is too often too low."""


@dataclass(frozen=True)
class Spread:
    """What repeats of the same case showed of one figure.

    Attributes:
        runs: how many there were, two at least.
        range: the highest less the lowest, in the figure's unit.
        median: in its unit, too; ``None``: an early baseline did not keep it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    runs: int
    range: int | float
    median: int | float | None = None

    @property
    def floor(self) -> float:
        """How far apart two runs of this case may be found by chance: three standard deviations of a difference.

        The standard deviation of single runs is estimated from their range. Since an estimate from few runs is often
        too low, two normal runs of the same code are further apart, the second one higher, in 8.3 % of all cases where
        2 runs were measured, in 3.9 % with 3, 1.7 % with 5, 0.7 % with 10, 0.4 % with 20.

        It holds for medians of several repeats, too, and is not made smaller for them: repeats of one run share what
        sets it apart from the next (the layout of its fork server's memory, the hour's load), which no number of them
        averages out.
        """
        spanned = _RANGE_OF_DEVIATIONS[min(self.runs, len(_RANGE_OF_DEVIATIONS) + 1) - 2]
        return _DEVIATIONS * math.sqrt(2) * self.range / spanned

    @property
    def factor(self) -> float | None:
        """The same as a factor: by how much two runs may differ where noise grows with the figure, as that of times
        does. ``None``: it is not known.
        """
        if not self.median:
            return None
        return math.exp(min(self.floor / abs(self.median), _LARGEST_EXPONENT))


@dataclass(frozen=True)
class Noise:
    """The spreads of a machine, by case id and metric field. Empty: nothing is known of it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    spreads: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)

    @classmethod
    def of_records(cls, records: Sequence[Record]) -> Noise:
        """From A/A repeats: records of one run with repeats, or of several runs of one suite on one machine.

        Times that other processes disturbed are left out.
        """
        values: dict[str, dict[str, list[float]]] = {}
        for record in records:
            if record.status == "ok":
                for name, value in record.metrics.items():
                    if value is not None and not is_disturbed(record, name):
                        values.setdefault(record.id, {}).setdefault(name, []).append(value)
        return cls.of_values(values)

    @classmethod
    def of_values(cls, values: Mapping[str, Mapping[str, Sequence[float]]]) -> Noise:
        """From the figures of A/A repeats, by case id and metric field; a single one shows nothing."""
        spreads = {
            case_id: {
                name: Spread(len(repeats), max(repeats) - min(repeats), statistics.median(repeats))
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

    def factor(self, case_id: str, field: str) -> float | None:
        """By which factor a time may differ by chance; ``None`` where too little is known of it."""
        spread = self.spreads.get(case_id, {}).get(field)
        return None if spread is None or spread.runs < RUNS_FOR_TIMES else spread.factor

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
