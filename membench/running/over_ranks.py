"""Metrics of a job on several ranks, from those of each rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD
from membench.running.derived_metrics import DerivedMetrics

_PEAK, _TOTAL, _IMBALANCE = "peak_live_bytes", "total_peak_live_bytes", "imbalance_ratio"
_FOOTPRINT, _TOTAL_FOOTPRINT = "peak_footprint_bytes", "total_peak_footprint_bytes"


def combine(ranks: Sequence[DerivedMetrics]) -> DerivedMetrics:
    """Return the metrics of a job: of each, what its row in METRICS says of several ranks.

    A figure that is the worst rank's names the rank. One that a rank should have and does not know is unknown.
    """
    found = DerivedMetrics()
    for field in dict.fromkeys(field for each in ranks for field in each.metrics):
        _combine_one(found, METRIC_OF_FIELD[field], ranks)
    _total(found, ranks)
    return found


def _combine_one(found: DerivedMetrics, metric: Metric, ranks: Sequence[DerivedMetrics]) -> None:
    field = metric.field
    known = {number: value for number, each in enumerate(ranks) if (value := each.metrics.get(field)) is not None}
    unknown = {number: each.reasons[field] for number, each in enumerate(ranks) if field in each.reasons}
    if not known or (unknown and metric.over_ranks != "any"):
        number, reason = next(iter(unknown.items()))
        found.add_unknown(field, reason if len(unknown) == len(ranks) else f"rank {number}: {reason}")
        return
    if metric.over_ranks == "sum":
        _add(found, field, sum(known.values()), _summed(field, ranks))
        return
    if metric.over_ranks == "any":
        number = min(known)
        _add(found, field, known[number], ranks[number].obtained[field])
        return
    number = (max if metric.better == "lower" else min)(known, key=lambda rank: known[rank])
    how = dict(ranks[number].obtained[field])
    # Another rank's value may be in a wider bracket, and then the worst one is known as little.
    how["bound"] = _bound_of(ranks[rank].obtained[field]["bound"] for rank in known)
    _add(found, field, known[number], {**how, "rank": number})


def _bound_of(bounds: Iterable[str]) -> str:
    """Return the bound of a sum, or of the worst, of values with these bounds."""
    loose = set(bounds) - {"exact"}
    if not loose:
        return "exact"
    # With bounds of both kinds it may be off in both directions.
    return loose.pop() if len(loose) == 1 else "about"


def _add(found: DerivedMetrics, field: str, value: float | int, how: Mapping[str, Any]) -> None:
    found.metrics[field] = value
    found.obtained[field] = dict(how)


def say_that_cores_are_shared(found: DerivedMetrics, ranks: int, threads: int) -> None:
    """Add to the sources of times that ranks shared the cores of one machine."""
    each = f"{threads} {'thread' if threads == 1 else 'threads'} each"
    for field, how in found.obtained.items():
        if METRIC_OF_FIELD[field].depends_on == "time":
            how["source"] = f"{how['source']}; {ranks} ranks shared the cores of one machine, {each}"


def _summed(field: str, ranks: Sequence[DerivedMetrics]) -> dict[str, Any]:
    every = [each.obtained[field] for each in ranks if field in each.obtained]
    bound = _bound_of(how["bound"] for how in every)
    summed: dict[str, Any] = {"source": f"sum over {len(every)} ranks: {every[0]['source']}", "bound": bound}
    for key in ("resolution_bytes", "at_least_bytes", "at_most_bytes"):
        if all(key in how for how in every):
            summed[key] = sum(how[key] for how in every)
    return summed


def add_total_footprint(found: DerivedMetrics, ranks: Sequence[DerivedMetrics]) -> None:
    """Add the sum of the ranks' footprint peaks."""
    if found.metrics.get(_FOOTPRINT) is None:
        found.add_unknown(_TOTAL_FOOTPRINT, found.reasons.get(_FOOTPRINT, "the ranks have no footprint peak"))
        return
    peaks = [each.metrics[_FOOTPRINT] or 0 for each in ranks]
    _add(found, _TOTAL_FOOTPRINT, sum(peaks), _summed(_FOOTPRINT, ranks))


def _total(found: DerivedMetrics, ranks: Sequence[DerivedMetrics]) -> None:
    """Add the sum of the ranks' live peaks, and by how much the highest is above their mean."""
    if found.metrics.get(_PEAK) is None:
        for field in (_TOTAL, _IMBALANCE):
            found.add_unknown(field, found.reasons.get(_PEAK, "the ranks have no live peak"))
        return
    peaks = [each.metrics[_PEAK] or 0 for each in ranks]
    how = _summed(_PEAK, ranks)
    _add(found, _TOTAL, sum(peaks), how)
    if sum(peaks) > 0:
        source = "highest live peak of a rank over the mean of all ranks"
        highest = max(range(len(peaks)), key=lambda rank: peaks[rank])
        found.add(_IMBALANCE, peaks[highest] / (sum(peaks) / len(peaks)), source,
                  "exact" if how["bound"] == "exact" else "about", rank=highest)  # fmt: skip
    else:
        found.add_unknown(_IMBALANCE, "no rank has live memory above its baseline")
