"""Times that other processes disturbed: readers mark them with ``~``, and draw no conclusion from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from membench.records.disturbance import calm_steps, has_waited, steps_are_disturbed
from membench.records.metrics import known_metric

if TYPE_CHECKING:
    from membench.protocol.readings import ProcessReading
    from membench.records.metric import Metric
    from membench.records.record import Record

WHY = "other processes used the cores"
SHARED = "its ranks share the cores of one machine"


def is_disturbed(record: Record, field: str) -> bool:
    """Whether a value of a record is a time, or derived from one, that other processes disturbed."""
    return is_disturbed_time(field, record.processes)


def is_disturbed_time(field: str, processes: Sequence[ProcessReading]) -> bool:
    """Whether a metric is a time, or derived from one, and what its processes read says that it was disturbed.

    Times of phases go by how long the phase's threads waited for cores, if that is known, and all others by the timed
    steps. The energy includes what the device takes while steps wait for calm, so no step may be disturbed.
    """
    metric = known_metric(field)
    if metric is None or metric.depends_on != "time" or not processes:
        return False
    return any(_is_disturbed_in(process, metric) for process in processes)


def _is_disturbed_in(process: ProcessReading, metric: Metric) -> bool:
    timed = process.phase(metric.timed_in) if metric.timed_in else None
    if timed is not None and timed.waited_s is not None:
        return has_waited(timed.duration_s, timed.waited_s)
    if metric.role == "energy":
        durations_s = process.durations_s or ()
        return len(calm_steps(durations_s, process.waited_s, process.passive)) < len(durations_s)
    return steps_are_disturbed(process)


def counted(records: Sequence[Record], field: str) -> list[Record]:
    """Return the records with a value that counts: those that were not disturbed, or all if each was."""
    known = [record for record in records if record.metrics.get(field) is not None]
    return [record for record in known if not is_disturbed(record, field)] or known


def median(records: Sequence[Record], field: str) -> float | None:
    """Return the median over the records with a value that counts; ``None`` if there are none."""
    values = [v for record in counted(records, field) if (v := record.metrics.get(field)) is not None]
    return statistics.median(values) if values else None


def are_disturbed(records: Sequence[Record], field: str) -> bool:
    """Whether records have values, and all of them were disturbed."""
    known = [record for record in records if record.metrics.get(field) is not None]
    return bool(known) and all(is_disturbed(record, field) for record in known)
