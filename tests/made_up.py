"""Records and runs of known figures, for what reads records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from membench.records.record import Record
from membench.records.run_file import Run

MIB = 2**20
GIB = 2**30


def record(
    technique: str,
    workload: str = "forward",
    *,
    model: str = "m",
    obtained: Mapping[str, Mapping[str, Any]] | None = None,
    **metrics: float | None,
) -> Record:
    """A case on a CPU that ended well."""
    case = {"model": model, "technique": technique, "workload": workload, "device": "cpu"}
    return Record(
        case=case, id=f"{model}/{technique}/{workload}/cpu", repeat=0, status="ok", ended_in=None, message=None,
        started_at="", duration_s=1.0, metrics=metrics, reasons={}, obtained=obtained or {}, processes=(), remarks=(),
        notes=(), broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


def run(records: Sequence[Record], **header: Any) -> Run:
    """A run of a suite named 'made-up'."""
    told = {"schema": 1, "run": "made-up-1", "suite": "made-up", "suite_text": "[suite]\nname = 'made-up'\n",
            "machine": {}, "started_at": "2026-11-24T10:00:00+00:00"}  # fmt: skip
    return Run(Path("made-up-1.jsonl"), told | header, tuple(records))
