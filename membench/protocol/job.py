"""The job: the unit of work of an executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from membench.host.device import Device

ASKS_WHERE = "SIGUSR2"
"""The signal on which a worker that is one of several ranks writes its stack to its output."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case, function or script to measure once. The kinds of jobs are in ``running.jobs``.

    Attributes:
        id: the id of its record.
        repeat: the number of the repeat, from 0.
        device: the device it runs on; for several devices, one process (rank) runs on each.
        limits: the limit of each limited metric, by metric field.
    """

    id: str
    repeat: int
    device: Device
    limits: Mapping[str, float] = field(default_factory=dict)
