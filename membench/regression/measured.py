"""What comparing reads of a run, and all that a baseline keeps of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from membench.record import Record, Status
from membench.regression.noise import Noise
from membench.store import Run


@dataclass(frozen=True)
class MeasuredCase:
    """One case over all its repeats.

    Attributes:
        status: of the worst repeat, with ``message`` and ``ended_in`` of that one.
        values: by metric field, that of each repeat that has one.
        reasons: by metric field, why it is not known.
        resolution_bytes: by metric field, how far off its source may be.
        bounds: by metric field, ``at least`` or ``at most`` where it is not exact.
        samples: by metric field, the single measurements (of steps) of each repeat, in the metric's unit.
        breakdown_bytes: by part of a step and category, at the part's highest moment.
        peak_part: the part with the highest live peak.
        modules: what the weights are made of, the largest first: ``modules`` (a name, or one with ``*`` for the numbers
            of layers that are alike), ``count``, ``bytes`` of all of them. ``None``: the record does not say.
        phases: by phase, ``peak_live_bytes`` and ``held_live_bytes``.
    """

    id: str
    status: Status
    message: str | None = None
    ended_in: str | None = None
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    resolution_bytes: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    breakdown_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    peak_part: str | None = None
    modules: Sequence[Mapping[str, Any]] | None = None
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def value(self, field: str) -> float | None:
        """The median over the repeats."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measured:
    """A run or a baseline, as far as comparing needs it.

    Attributes:
        name: what it is called in tables and messages: a run's or a baseline's name.
        machine: as ``environment.describe`` says it.
        noise: of A/A repeats kept with a baseline, and of a run's own repeats.
    """

    name: str
    suite: str
    machine: Mapping[str, Any]
    measured_at: str
    cases: Mapping[str, MeasuredCase]
    noise: Noise = field(default_factory=Noise)


def of_run(run: Run, name: str | None = None) -> Measured:
    """A run as it was read. What its own repeats show of noise is taken up."""
    raise NotImplementedError


def of_records(records: Sequence[Record], name: str, suite: str = "") -> Measured:
    """Records that are at hand, of one machine; of the same case and repeat, all count as repeats."""
    raise NotImplementedError
