"""Whether a time has changed: effect, interval and chance, from the durations of steps over repeats.

Steps of one repeat share its luck: a neighbour on the machine slows them all. So a change of time is certain only if it
was seen in several repeats, and if the fastest of them shows it, since nothing makes a step faster than it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_REPEATS = 3
"""Of either measurement: with fewer no change of time is certain. One that was made once may have had all the luck."""

_REPEATS_FOR_THEMSELVES = 4
"""From here on repeats are the samples, not their steps: with fewer no test can tell them apart."""

_BY_CHANCE = 0.02
_CONFIDENCE = 0.95
_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Timing:
    """A time against an earlier one.

    Attributes:
        ratio: of the medians, new over base.
        interval: 95 % of it, by bootstrap (percentiles); ``None`` with less than two samples a side.
        p_value: that the new one is as fast or faster, and looks slower by chance (Mann-Whitney, one-sided).
        p_value_of_gain: the same the other way round.
        fastest: the fastest repeat's median over that of the base's repeats.
        apart: the same over the base's slowest repeat.
        repeats_base, repeats_new: how many there were.
    """

    ratio: float
    interval: tuple[float, float] | None
    p_value: float
    p_value_of_gain: float
    fastest: float
    apart: float
    repeats_base: int
    repeats_new: int

    @property
    def are_enough(self) -> bool:
        """Whether there are repeats enough for anything to be certain."""
        return min(self.repeats_base, self.repeats_new) >= LEAST_REPEATS

    def is_certainly_slower(self, by: float) -> bool:
        """Whether it got slower, and not by chance.

        With too few repeats for a test of their own, each has to be slower than every one of the base.

        Args:
            by: the share that is tolerated. The fastest repeat has to show half of it.
        """
        are_few = min(self.repeats_base, self.repeats_new) < _REPEATS_FOR_THEMSELVES
        return (
            self.are_enough
            and self.ratio > 1 + by
            and self.p_value < _BY_CHANCE
            and (self.interval is None or self.interval[0] > 1)
            and self.fastest > 1 + by / 2
            and (self.apart > 1 or not are_few)
        )

    def is_certainly_faster(self, by: float) -> bool:
        """Whether it got faster, and not by chance."""
        return (
            self.are_enough
            and self.ratio < 1 - by
            and self.p_value_of_gain < _BY_CHANCE
            and (self.interval is None or self.interval[1] < 1)
        )


def compare(base: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Timing:
    """Compare the durations of steps, in seconds, repeat by repeat; no side is empty, nor a repeat of it."""
    from scipy import stats

    medians_base, medians_new = ([statistics.median(repeat) for repeat in side] for side in (base, new))
    if min(len(base), len(new)) >= _REPEATS_FOR_THEMSELVES:
        samples_base, samples_new = medians_base, medians_new
    else:
        samples_base, samples_new = ([step for repeat in side for step in repeat] for side in (base, new))
    return Timing(
        statistics.median(medians_new) / statistics.median(medians_base),
        _interval(samples_base, samples_new),
        float(stats.mannwhitneyu(samples_new, samples_base, alternative="greater").pvalue),
        float(stats.mannwhitneyu(samples_new, samples_base, alternative="less").pvalue),
        min(medians_new) / statistics.median(medians_base),
        min(medians_new) / max(medians_base),
        len(base),
        len(new),
    )


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
