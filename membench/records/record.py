"""The record: all that measuring one job wrote, and all that everything else reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from membench.protocol.readings import ProcessReading
from membench.records.metric import Metric
from membench.records.metrics import metrics_with

SCHEMA_VERSION = 1
"""History: 1, the first."""

Status = Literal["ok", "diverged", "out-of-memory", "timeout", "crashed", "failed", "skipped"]
"""``diverged``: a training whose loss is no number any more; all figures are there."""


@dataclass(frozen=True)
class Record:
    """All that one case measured.

    Attributes:
        case: the case, as the suite wrote it and with what its names stand for.
        repeat: which repetition, from 0.
        ended_in: the phase in which a case that is not ``ok`` ended.
        metrics: by ``Metric.field``; ``None`` where a figure is not known, and then ``reasons`` says why. A figure
            that has no meaning for the case (backward time of a forward pass) is left out.
        obtained: by field, how: ``source``; ``bound`` (``exact``, ``at least``, ``at most``); where it applies
            ``interval_s`` between samples and ``children`` (whether child processes are in the figure).
        remarks: what is wrong with the case although it ended well (a technique that changed nothing).
        notes: what explains its figures (why a technique saved less than it is known for).
        processes: what was read of each process (rank). Earlier records know neither what weights are made of nor for
            how long threads waited for cores, or in the latter have what threads waited for one another, too.
        timeline: columns of samples over the whole case, ``at_s`` from its start.
        output_tail: the end of what the case printed, where it did not end well.
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
    schema: int = SCHEMA_VERSION

    @property
    def group(self) -> tuple[str, str, str]:
        return (self.case["model"], self.case["workload"], self.case["device"])

    @property
    def technique(self) -> str:
        return str(self.case["technique"])


def metrics_in(records: Iterable[Record]) -> tuple[Metric, ...]:
    """The built-in metrics, and those of plug-ins that records have."""
    return metrics_with(field for record in records for field in record.metrics)
