"""The peak that decides what fits: the highest of all phases of a case, with what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from membench.records.metrics import METRIC_OF_FIELD, PEAK_OF_PHASE
from membench.records.record import Record
from membench.units import format_bytes

HIGHEST, RUNNING = "highest_peak_live_bytes", PEAK_OF_PHASE["run"].field


@dataclass(frozen=True)
class Peak:
    """A peak: surely ``at_least_bytes``; no more than ``at_most_bytes``, where that is known.

    Attributes:
        field: the metric that it is of.
        is_upper_bound: whether its metric is given as an upper bound.
        off_bytes: how far off its source may be.
    """

    field: str
    at_least_bytes: float
    at_most_bytes: float | None
    is_upper_bound: bool
    off_bytes: float

    def __str__(self) -> str:
        if self.at_most_bytes is None:
            amount = f"{format_bytes(self.at_least_bytes)} or more, as far as samples saw"
        elif not self.at_least_bytes:
            amount = f"{format_bytes(self.at_most_bytes)} at most"
        elif self.at_most_bytes > self.at_least_bytes:
            amount = f"{format_bytes(self.at_least_bytes)} to {format_bytes(self.at_most_bytes)}"
        else:
            amount = format_bytes(self.at_least_bytes)
        return f"{amount} at its {METRIC_OF_FIELD[self.field].title}"

    @property
    def highest_bytes(self) -> float:
        """As far as is known."""
        return self.at_least_bytes if self.at_most_bytes is None else self.at_most_bytes

    @property
    def value(self) -> float:
        """The value that its metric is given with."""
        return self.highest_bytes if self.is_upper_bound else self.at_least_bytes

    def obtained(self) -> dict[str, Any]:
        """Return how the metric ``highest_peak_live`` was obtained, if this is the highest peak."""
        how: dict[str, Any] = {
            "source": f"the highest of the phases' live peaks: the {METRIC_OF_FIELD[self.field].title}"
        }
        if self.off_bytes:
            how["resolution_bytes"] = self.off_bytes
        if self.at_most_bytes == self.at_least_bytes:
            return how | {"bound": "exact"}
        if self.is_upper_bound:
            return how | {"bound": "at most", "at_least_bytes": self.at_least_bytes}
        known = {} if self.at_most_bytes is None else {"at_most_bytes": self.at_most_bytes}
        return how | {"bound": "at least", **known}


def peaks_of(
    metrics: Mapping[str, float | None], obtained: Mapping[str, Mapping[str, Any]], fields: Iterable[str]
) -> list[Peak]:
    """Return the peaks among metrics that are known."""
    return [
        _peak(field, value, obtained.get(field, {})) for field in fields if (value := metrics.get(field)) is not None
    ]


def _peak(field: str, value: float, how: Mapping[str, Any]) -> Peak:
    off_bytes = how.get("resolution_bytes", 0)
    match how.get("bound"):
        case "at least":
            most_bytes = how.get("at_most_bytes")
            return Peak(field, value, None if most_bytes is None else max(most_bytes, value), False, off_bytes)
        case "at most":
            return Peak(field, how.get("at_least_bytes", 0), value, True, off_bytes)
        case "about" if "at_most_bytes" in how:
            return Peak(field, how.get("at_least_bytes", 0), max(how["at_most_bytes"], value), True, off_bytes)
    return Peak(field, value, value, False, off_bytes)


def highest(peaks: Sequence[Peak]) -> Peak | None:
    """Return the highest of several peaks, with what all of them say of its bounds; ``None`` if there are none."""
    if not peaks:
        return None
    at_least_bytes = max(peak.at_least_bytes for peak in peaks)
    if any(peak.at_most_bytes is None for peak in peaks):
        found = max(peaks, key=lambda peak: peak.at_least_bytes)
        return dataclasses.replace(found, at_most_bytes=None, is_upper_bound=False)
    found = max(peaks, key=lambda peak: (peak.highest_bytes, peak.at_least_bytes))
    return dataclasses.replace(found, at_least_bytes=at_least_bytes)


LIVE_PEAKS = tuple(metric.field for metric in PEAK_OF_PHASE.values())
"""The fields of the live peaks of phases."""


def highest_live_peak(metrics: Mapping[str, float | None], obtained: Mapping[str, Mapping[str, Any]]) -> Peak | None:
    """Return the highest live peak of a case's phases: the memory that has to be there for it.

    ``None`` if that of running is not known, or is the only one that is.
    """
    peaks = peaks_of(metrics, obtained, LIVE_PEAKS)
    return highest(peaks) if len(peaks) > 1 and metrics.get(RUNNING) is not None else None


def with_highest_peak(record: Record) -> Record:
    """Add the metric ``highest_peak_live`` to a record that an earlier version wrote."""
    if HIGHEST in record.metrics:
        return record
    peak = highest_live_peak(record.metrics, record.obtained)
    if peak is None:
        return record
    return dataclasses.replace(
        record,
        metrics={**record.metrics, HIGHEST: peak.value},
        obtained={**record.obtained, HIGHEST: peak.obtained()},
    )
