"""What measuring writes and everything else reads: cases, phases, records, and the one table of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from membench import units

SCHEMA_VERSION = 1
"""History: 1, the first."""

Status = Literal["ok", "out-of-memory", "timeout", "crashed", "failed", "skipped"]


@dataclass(frozen=True)
class Metric:
    """One figure of a case.

    ``field`` is its key in ``Record.metrics`` and ends in the unit; ``better`` says which direction is a gain.
    """

    name: str
    field: str
    title: str
    better: Literal["lower", "higher"]
    format: Callable[[Any], str]
    meaning: str


def _rate(value: float) -> str:
    return f"{value:.4g}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "weights", "weights_bytes", "weights", "lower", units.format_bytes, "parameters and buffers, a storage once"
    ),
    Metric(
        "peak_live", "peak_live_bytes", "live peak", "lower", units.format_bytes, "most memory in use while running"
    ),
    Metric("held_live", "held_live_bytes", "live held", "lower", units.format_bytes, "memory in use after running"),
    Metric(
        "peak_footprint",
        "peak_footprint_bytes",
        "footprint peak",
        "lower",
        units.format_bytes,
        "highest memory taken from the machine while running",
    ),
    Metric("disk", "disk_bytes", "disk", "lower", units.format_bytes, "saved checkpoint"),
    Metric("time", "step_median_s", "time", "lower", units.format_seconds, "median duration of a step"),
    Metric("tokens_per_s", "tokens_per_s", "tokens/s", "higher", _rate, "tokens of a step over its median duration"),
    Metric("apply_peak_live", "apply_peak_live_bytes", "apply peak", "lower", units.format_bytes, "while converting"),
    Metric("load_peak_live", "load_peak_live_bytes", "load peak", "lower", units.format_bytes, "peak while loading"),
    Metric("bits_per_byte", "bits_per_byte", "bits/byte", "lower", _rate, "held-out bits per byte of text"),
)


@dataclass(frozen=True)
class Plugin:
    """A plug-in named by a suite: what to look up and with which options."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One thing to measure, with names as the suite wrote them and what they stand for."""

    model: str
    technique: str
    workload: str
    device: str
    model_plugin: Plugin
    technique_plugins: tuple[Plugin, ...]
    workload_plugin: Plugin

    @property
    def id(self) -> str:
        return f"{self.model}/{self.technique}/{self.workload}/{self.device}"

    @property
    def group(self) -> tuple[str, str, str]:
        return (self.model, self.workload, self.device)


@dataclass(frozen=True)
class Record:
    """All that one case measured. ``metrics`` holds ``None`` for what is not known, ``reasons`` says why."""

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
    sources: Mapping[str, str]
    processes: tuple[Mapping[str, Any], ...]
    remarks: tuple[str, ...]
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
