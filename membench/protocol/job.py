"""A job: what is measured, as it is handed to an executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from membench.host.device import Device


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to measure once. Its kinds are in ``running.jobs``.

    Attributes:
        id: of its record.
        repeat: which repetition, from 0.
        device: on which it runs, with one process (rank) on each where there are several.
        limits: by metric field, which its figures must keep.
    """

    id: str
    repeat: int
    device: Device
    limits: Mapping[str, float] = field(default_factory=dict)
