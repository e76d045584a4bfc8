"""The memory of a job over time: the samples of all its ranks, added."""

from __future__ import annotations

import time
from dataclasses import dataclass

_MOST_SAMPLES = 2000


@dataclass(frozen=True)
class Sample:
    """One sample, or the maximum of several merged samples; ``None`` for values that were not read."""

    at_s: float
    resident_bytes: int
    anonymous_bytes: int
    children_bytes: int
    gpu_process_bytes: int | None
    gpu_used_bytes: int | None

    @property
    def held_bytes(self) -> int:
        """Bytes held by the process and its children."""
        return self.resident_bytes + self.children_bytes


class Timeline:
    """The samples of a job.

    At most 2,000 samples are kept. Beyond that, neighbours are merged into their maximum: a long job loses time
    resolution, but never a peak.
    """

    def __init__(self) -> None:
        self._per_sample, self._count = 1, 0
        self._pending: Sample | None = None
        self._samples: list[Sample] = []
        self._latest: dict[int, Sample] = {}
        self._began_s: float | None = None

    def add(self, rank: int, sample: Sample) -> None:
        """Add a sample of a rank to the latest samples of the other ranks."""
        self._latest[rank] = sample
        together = _sum_of([sample, *(each for other, each in self._latest.items() if other != rank)])
        self._count += 1
        self._pending = together if self._pending is None else _merged(self._pending, together)
        if self._count % self._per_sample:
            return
        self._samples.append(self._pending)
        self._pending = None
        if len(self._samples) >= _MOST_SAMPLES:
            self._per_sample *= 2
            odd = self._samples[len(self._samples) // 2 * 2 :]
            self._samples = [*map(_merged, self._samples[::2], self._samples[1::2]), *odd]

    def begin(self) -> float:
        """Return the start that times of samples count from: that of the job's first process."""
        if self._began_s is None:
            self._began_s = time.monotonic()
        return self._began_s

    def end(self, rank: int) -> None:
        """Count a rank no more: it has ended and holds nothing."""
        self._latest.pop(rank, None)

    def columns(self) -> dict[str, list[float | int | None]]:
        """Return the samples as columns, without columns that have no values."""
        samples = self._samples + ([self._pending] if self._pending else [])
        columns: dict[str, list[float | int | None]] = {
            "at_s": [round(sample.at_s, 4) for sample in samples],
            "rss_bytes": [sample.resident_bytes for sample in samples],
            "anonymous_bytes": [sample.anonymous_bytes for sample in samples],
            "children_unique_bytes": [sample.children_bytes for sample in samples],
            "gpu_process_bytes": [sample.gpu_process_bytes for sample in samples],
            "gpu_used_above_idle_bytes": [sample.gpu_used_bytes for sample in samples],
        }
        return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def _sum_of(samples: list[Sample]) -> Sample:
    """Return the sum of the samples of several ranks; the time is that of the first."""

    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return Sample(
        samples[0].at_s,
        sum(sample.resident_bytes for sample in samples),
        sum(sample.anonymous_bytes for sample in samples),
        sum(sample.children_bytes for sample in samples),
        total([sample.gpu_process_bytes for sample in samples]),
        total([sample.gpu_used_bytes for sample in samples]),
    )


def _merged(first: Sample, second: Sample) -> Sample:
    """Merge two neighbours: the maximum of each value, at the time of the larger resident memory."""

    def most(a: int | None, b: int | None) -> int | None:
        return max((value for value in (a, b) if value is not None), default=None)

    return Sample(
        first.at_s if first.resident_bytes >= second.resident_bytes else second.at_s,
        max(first.resident_bytes, second.resident_bytes),
        max(first.anonymous_bytes, second.anonymous_bytes),
        max(first.children_bytes, second.children_bytes),
        most(first.gpu_process_bytes, second.gpu_process_bytes),
        most(first.gpu_used_bytes, second.gpu_used_bytes),
    )
