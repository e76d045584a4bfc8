"""The record: the result of measuring one job, which tables, comparisons, gates and reports read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from membench.host.device import Device
from membench.protocol.case import Group, reference_group
from membench.protocol.readings import ProcessReading
from membench.records.metric import Metric
from membench.records.metrics import metrics_with

SCHEMA_VERSION = 1
"""History: 1, the first."""

Status = Literal["ok", "diverged", "out-of-memory", "timeout", "crashed", "failed", "skipped"]
"""``diverged``: the training loss became non-finite; all metrics were measured nevertheless."""

CUT_SHORT: tuple[Status, ...] = ("crashed", "out-of-memory", "timeout")
"""The statuses of jobs that something ended from outside; another attempt may go further."""

PREPARING = "prepare"
"""What ``ended_in`` says of a case whose model could not be prepared."""


@dataclass(frozen=True)
class Record:
    """The result of measuring one case, function or script once.

    Attributes:
        case: the case: its names in the suite, and the plug-ins and options that they refer to.
        repeat: the number of the repetition, from 0.
        ended_in: the phase in which a case that is not ``ok`` ended.
        metrics: values by ``Metric.field``; ``None`` if a value is not known, and then ``reasons`` says why. A metric
            that has no meaning for the case (such as the backward time of a forward pass) is left out.
        obtained: how each value was obtained, by field: ``source``; ``bound`` (``exact``, ``at least``, ``at most``);
            where they apply, ``interval_s`` between samples and ``children`` (whether child processes are included).
        remarks: problems of a case that ended well (such as a technique that changed nothing).
        notes: explanations of the values (such as why a technique saved less than its nominal factor).
        processes: the readings of each process (rank). Earlier records lack the weights by module and the time that
            threads waited for cores, or include in that time the waits of threads for each other.
        unchecked_limits: a sentence for each limit of a skipped case, or on a figure that is not known.
        timeline: columns of samples over the whole case, with ``at_s`` in seconds from its start.
        output_tail: the case's output, if the case failed; of a long one the beginning and the end.
    """

    case: Mapping[str, Any]
    id: str
    repeat: int
    status: Status
    ended_in: str | None
    message: str | None
    started_at: str
    duration_s: float
    metrics: Mapping[str, float | int | None]
    reasons: Mapping[str, str]
    obtained: Mapping[str, Mapping[str, Any]]
    processes: tuple[ProcessReading, ...]
    remarks: tuple[str, ...]
    notes: tuple[str, ...]
    broken_limits: tuple[str, ...]
    timeline: Mapping[str, Any]
    output_tail: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    unchecked_limits: tuple[str, ...] = ()
    schema: int = SCHEMA_VERSION

    @property
    def is_unprepared(self) -> bool:
        """Whether the case was not begun, because the preparing of its model was killed."""
        return self.ended_in == PREPARING and self.status in CUT_SHORT

    @property
    def device(self) -> Device:
        return Device.parse(self.case["device"])

    def process_of(self, field: str) -> ProcessReading:
        """Return the readings of the rank whose value a metric of several ranks is; of a job without ranks, its own."""
        rank = self.obtained.get(field, {}).get("rank", 0)
        return next((process for process in self.processes if process.rank == rank), self.processes[0])

    @property
    def group(self) -> Group:
        return (self.case["model"], self.case["workload"], self.case["device"])

    @property
    def reference_group(self) -> Group:
        """The group of its reference: on a single device for a case in ranks."""
        return reference_group(self.group)

    @property
    def part_groups(self) -> Mapping[str, Group]:
        """The groups of the parts of its stack that ran on other devices than the case, by technique."""
        devices = self.case.get("part_devices", {})
        return {part: (self.case["model"], self.case["workload"], device) for part, device in devices.items()}

    @property
    def technique(self) -> str:
        return str(self.case["technique"])


def metrics_in(records: Iterable[Record]) -> tuple[Metric, ...]:
    """Return the built-in metrics, and the custom metrics of records."""
    return metrics_with(field for record in records for field in record.metrics)
