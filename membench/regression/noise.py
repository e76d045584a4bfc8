"""How far apart runs of the same case are on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from membench.record import Record


@dataclass(frozen=True)
class Spread:
    """What repeats of the same case showed of one figure.

    Attributes:
        runs: how many there were, two at least.
        range: the highest less the lowest, in the figure's unit.
    """

    runs: int
    range: float

    @property
    def floor(self) -> float:
        """How far apart two runs of this case may be found by chance: three standard deviations of a difference.

        The standard deviation of single runs is estimated from their range (Tippett's d2).
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Noise:
    """The spreads of a machine, by case id and metric field. Empty: nothing is known of it."""

    spreads: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)

    @classmethod
    def of_records(cls, records: Sequence[Record]) -> Noise:
        """From A/A repeats: records of one run with repeats, or of several runs of one suite on one machine."""
        raise NotImplementedError

    def floor(self, case_id: str, field: str) -> float:
        """Below which a difference means nothing; 0 where nothing is known."""
        raise NotImplementedError

    def __or__(self, other: Noise) -> Noise:
        """Both; where both know a spread, that of the larger floor."""
        raise NotImplementedError
