"""Records and runs of known figures, for what reads records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from membench.host.device import Device
from membench.protocol import messages
from membench.protocol.case import Case
from membench.protocol.readings import ProcessReading
from membench.records.encoding import process_of
from membench.records.record import Record
from membench.records.run_file import Run
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.jobs.case import CaseJob
from membench.suite.schema import Settings

MIB = 2**20
GIB = 2**30


def record(
    technique: str,
    workload: str = "forward",
    *,
    model: str = "m",
    device: str = "cpu",
    parts: Mapping[str, str] | None = None,
    obtained: Mapping[str, Mapping[str, Any]] | None = None,
    **metrics: float | None,
) -> Record:
    """A case that ended well.

    Args:
        parts: the devices of the parts of a stack that ran on another device, by technique.
    """
    case: dict[str, Any] = {"model": model, "technique": technique, "workload": workload, "device": device}
    case |= {"part_devices": parts} if parts else {}
    return Record(
        case=case, id=f"{model}/{technique}/{workload}/{device}", repeat=0, status="ok", ended_in=None, message=None,
        started_at="", duration_s=1.0, metrics=metrics, reasons={}, obtained=obtained or {}, processes=(), remarks=(),
        notes=(), broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


def process(**read: Any) -> ProcessReading:
    """What was read of a worker on a CPU, as a run's file would have it; its phases may leave out what is usual."""
    phases = [{"name": "run", "allocator": "pinned", **phase} for phase in read.pop("phases", ())]
    return process_of({"role": "worker", "rank": 0, "device": "cpu", "phases": phases, **read})


def case_figures(phases: Sequence[Mapping[str, Any]], result: Mapping[str, Any], device: str = "cpu") -> DerivedMetrics:
    """The metrics of a case that ended well, from what a worker would have said."""
    job = CaseJob(
        id="c", repeat=0, device=Device.parse(device), settings=Settings.model_validate({}), case=cast(Case, None)
    )
    said = messages.decode(json.dumps({"event": "result", "result": result}).encode())
    assert isinstance(said, messages.ResultSoFar)
    read = (process(phases=phases, device=device),)
    return job.derive(JobReadings("ok", job.device.on_gpu, 0.02, read, (said.result,)))


def run(records: Sequence[Record], **header: Any) -> Run:
    """A run of a suite named 'made-up'."""
    told = {"schema": 1, "run": "made-up-1", "suite": "made-up", "suite_text": "[suite]\nname = 'made-up'\n",
            "machine": {}, "started_at": "2026-11-24T10:00:00+00:00"}  # fmt: skip
    return Run(Path("made-up-1.jsonl"), told | header, tuple(records))
