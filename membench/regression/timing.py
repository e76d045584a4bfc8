"""Whether a time has changed: effect, interval and chance, from the durations of steps over repeats.

Steps of one repeat share its luck: a neighbour on the machine slows them all. So repeats are what counts, and there are
two ways in which a slowdown is told from chance:

- by rank, where both sides have repeats enough (Mann-Whitney over the repeats' medians);
- by the machine's noise, where it was calibrated: how far apart runs of the same code are.

Where both are known, both have to say so: repeats of one run are more alike than runs are. Whichever it is, the fastest
repeat has to show the slowdown, since nothing makes a step faster than it is.

How often, at most, a figure that has not changed is called slower:

- by rank, of repeats that are exchangeable (measured in turn, ``--against-ref``): at most 5 % with 3 repeats a side,
  2.9 % with 3 and 4, below 2 % from 3 and 5 or 4 and 4 on. Suspects are measured again before the last word, which then
  falls on 6 and 6 or more, and is right to below 2 %;
- by rank, of runs on different days: as often as the machine itself got slower. Calibrated noise guards against that;
- by noise of five calibrated runs, of durations whose logarithms are normal: 1.7 % of single runs, 0.6 % where suspects
  are measured again (``Spread.floor`` says it of other numbers).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_REPEATS = 3
"""Of either measurement: with fewer their ranks tell nothing. One that was made once may have had all the luck."""

_BY_CHANCE = 0.02
_CONFIDENCE = 0.95
_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Timing:
    """A time against an earlier one.

    Attributes:
        ratio: of the medians, new over base.
        interval: 95 % of it, by bootstrap (percentiles) over the repeats' medians. With too few repeats over the single
            steps: it then says what these steps are good for, and nothing of other runs. ``None`` with less than two
            samples a side.
        p_value: that the new one is as fast or faster, and looks slower by chance (Mann-Whitney over the repeats'
            medians, one-sided); ``None`` with too few repeats.
        p_value_of_gain: the same the other way round.
        fastest: the fastest repeat's median over that of the base's repeats.
        repeats_base, repeats_new: how many there were.
    """

    ratio: float
    interval: tuple[float, float] | None
    p_value: float | None
    p_value_of_gain: float | None
    fastest: float
    repeats_base: int
    repeats_new: int

    @property
    def are_enough(self) -> bool:
        """Whether there are repeats enough for their ranks to tell something."""
        return min(self.repeats_base, self.repeats_new) >= LEAST_REPEATS

    def is_certainly_slower(self, by: float, noise: float | None = None) -> bool:
        """Whether it got slower, and not by chance.

        Args:
            by: the share that is tolerated. The fastest repeat has to show half of it.
            noise: the factor by which runs of the same code differ on this machine, where that is known.
        """
        interval = self.interval if self.are_enough else None
        return (
            self.ratio > 1 + by
            and self.fastest > 1 + by / 2
            and (interval is None or interval[0] > 1)
            and self._is_told(self.ratio, self.p_value, noise)
        )

    def is_certainly_faster(self, by: float, noise: float | None = None) -> bool:
        """Whether it got faster, and not by chance."""
        interval = self.interval if self.are_enough else None
        return (
            self.ratio < 1 - by
            and (interval is None or interval[1] < 1)
            and self._is_told(1 / self.ratio, self.p_value_of_gain, noise)
        )

    def _is_told(self, factor: float, p_value: float | None, noise: float | None) -> bool:
        if noise is not None and factor <= noise:
            return False
        return noise is not None if p_value is None else p_value <= self._by_chance

    @property
    def _by_chance(self) -> float:
        """The p-value from which on chance is ruled out; where repeats are so few that even all of one side before all
        of the other have a higher one, it is that.
        """
        orders = math.comb(self.repeats_base + self.repeats_new, self.repeats_base)
        return max(_BY_CHANCE, 1 / orders) * (1 + 1e-9)


def compare(base: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Timing:
    """Compare the durations of steps, in seconds, repeat by repeat; no side is empty, nor a repeat of it."""
    medians_base, medians_new = ([statistics.median(repeat) for repeat in side] for side in (base, new))
    are_enough = min(len(base), len(new)) >= LEAST_REPEATS
    steps_base, steps_new = ([step for repeat in side for step in repeat] for side in (base, new))
    return Timing(
        statistics.median(medians_new) / statistics.median(medians_base),
        _interval(medians_base, medians_new) if are_enough else _interval(steps_base, steps_new),
        _by_rank(medians_new, medians_base) if are_enough else None,
        _by_rank(medians_base, medians_new) if are_enough else None,
        min(medians_new) / statistics.median(medians_base),
        len(base),
        len(new),
    )


def _by_rank(slower: Sequence[float], faster: Sequence[float]) -> float:
    from scipy import stats

    return float(stats.mannwhitneyu(slower, faster, alternative="greater").pvalue)


def _interval(base: Sequence[float], new: Sequence[float]) -> tuple[float, float] | None:
    if min(len(base), len(new)) < 2:
        return None
    import numpy
    from scipy import stats

    def ratio(of_new: Any, of_base: Any, axis: int) -> Any:
        return numpy.median(of_new, axis=axis) / numpy.median(of_base, axis=axis)

    found = stats.bootstrap(
        (numpy.asarray(new), numpy.asarray(base)),
        ratio,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=numpy.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
