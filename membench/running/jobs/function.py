"""The job ``function``: calls of a user's function, such as one passed by a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.protocol import requests
from membench.protocol.case import REFERENCE
from membench.protocol.forking import StartWorker
from membench.running import deriving
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings, WorkerMemory
from membench.running.jobs.runnable import RunnableJob
from membench.running.references import References

PRELOADED = ("membench.protocol.pickling", "membench.worker.main", "safetensors.torch")
"""Modules that the fork server imports once: torch among them, since most functions use it sooner or later."""

_EXPECTED = ("peak_live_bytes", "held_live_bytes", "peak_footprint_bytes", "held_footprint_bytes", "step_median_s")
"""Metrics that every record of a function has, as a value or as the reason why it is unknown."""


@dataclass(frozen=True, kw_only=True)
class FunctionJob(RunnableJob):
    """Calls of a function, measured in the same phases as a case.

    Attributes:
        model: the entry for ``model`` in its record; ``workload`` likewise.
        pickled: the file with the function, its arguments and its environment, as ``worker.function`` reads it.
        raised: the file for an exception that the function raises.
    """

    model: str
    workload: str
    pickled: Path
    raised: Path

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(PRELOADED)

    @property
    def names(self) -> Mapping[str, Any]:
        # No technique is applied and no other job belongs to it: it is its own reference.
        return {
            "model": self.model, "technique": REFERENCE, "workload": self.workload, "device": str(self.device),
        }  # fmt: skip

    def raised_by(self, number: int) -> str:
        """Return the file for an exception of a rank; that of rank 0 is ``raised`` itself."""
        return f"{self.raised}-{number}" if number else str(self.raised)

    def order(self, number: int, references: References) -> StartWorker:
        del references
        work = requests.MeasureFunction(str(self.pickled), self.raised_by(number), self.steps)
        request = requests.encode(requests.Request(work, self.rank_request(number)))
        return StartWorker(request, number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        """Derive the metrics that need no model and no quality."""
        found = DerivedMetrics()
        process, result = readings.processes[0], readings.results[0]
        if result is None:
            for name in _EXPECTED:
                found.add_unknown(name, f"the case ended as {readings.status}")
            return found
        memory = WorkerMemory.of(process, result, on_gpu=readings.on_gpu)
        run, time = deriving.phase_of(process, "run"), deriving.phase_of(process, "time")
        deriving.step_memory(found, run, memory)
        deriving.warmup(found, deriving.phase_of(process, "warmup"), memory)
        deriving.footprint(found, run, time, memory, readings.interval_s)
        deriving.children(found, process.phases, readings.interval_s)
        deriving.times(found, result, time, on_gpu=readings.on_gpu)
        return found
