"""The job ``script``: a user's program as it is, whole, with the phases that it marks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from membench.protocol.case import Case
from membench.protocol.forking import StartProgram, WorkerEnded
from membench.protocol.messages import MarkEntered, MarkLeft, Message, Result
from membench.protocol.readings import PhaseReading
from membench.running import deriving, program_ending
from membench.running.deriving import JobReadings
from membench.running.figures import Figures, resolution_bytes
from membench.running.jobs.case import case_names
from membench.running.jobs.kind import RunnableJob
from membench.running.marked_phases import MOST_PHASES, MarkedPhases
from membench.running.observer import Observer
from membench.running.rank import Rank, Tell
from membench.running.references import References

NO_LIVE = "a script keeps its own allocator: what it freed and still holds cannot be told from what it uses"
_STREAMS = (0, 1)
_GRACE_S = 0.5
"""Helpers of multiprocessing end by themselves when they see that their program has."""


@dataclass(frozen=True, kw_only=True)
class ScriptJob(RunnableJob):
    """A program of the user's, its interpreter included."""

    streams: ClassVar = _STREAMS

    case: Case

    @property
    def names(self) -> Mapping[str, Any]:
        return case_names(self.case)

    @property
    def threads(self) -> int | None:
        return None

    def rank(self, number: int, tell: Tell) -> Rank:
        return _Program(number, self.device.ranks[number], tell)

    def order(self, number: int, references: References) -> StartProgram:
        del references
        assert self.case.command is not None
        return StartProgram(self.case.command, number, _GRACE_S)

    def derive(self, readings: JobReadings) -> Figures:
        """To where it ended, however it did; nothing is taken off."""
        found = Figures()
        found.miss("peak_live_bytes", NO_LIVE)
        process, result = readings.processes[0], readings.results[0]
        if not process.phases or result is None:
            for name in ("peak_footprint_bytes", "step_median_s"):
                found.miss(name, f"the case ended as {readings.status}")
            return found
        whole = process.phases[0]
        if readings.on_gpu:
            _gpu_footprint(found, whole, readings.interval_s)
        else:
            _footprint(found, whole, readings.interval_s, had_children=result.had_children)
        deriving.children(found, process.phases, readings.interval_s)
        if readings.status == "ok":
            found.know("step_median_s", result.durations_s[0], "monotonic clock, from the script's start to its end")
        else:
            found.miss("step_median_s", f"the case ended as {readings.status}")
        return found


class _Program(Rank):
    """A program under way: it marks phases, and prints for its user."""

    role = "script"
    is_heard_to_the_end = True
    survives_interrupts = True

    def started(self, observer: Observer, no_gpus: str | None, at_s: float) -> None:
        super().started(observer, no_gpus, at_s)
        if self.device.on_gpu:
            self._gpu_unknown = no_gpus or observer.use_gpu_of(str(self.device))
        self._marked = MarkedPhases(observer.pid, observer)

    def hear(self, message: Message) -> None:
        match message:
            case MarkEntered():
                self._tell("phase", {"phase": self._marked.enter(message.phase)})
            case MarkLeft():
                self._marked.leave(message.phase, message.raised)
            case _:
                super().hear(message)

    def print_out(self, data: bytes) -> None:
        super().print_out(data)
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(2, data) :]

    def ended(self, ended: WorkerEnded) -> None:
        """What it took, and how it ended unless a signal or the clock ended it."""
        said = program_ending.last_line(self.tail)
        self.phase = self._marked.ended_in(said)
        self.phases = [
            dataclasses.replace(phase, gpu_unknown=phase.gpu_unknown or self._gpu_unknown)
            for phase in self._marked.end(ended.at_s, ended.peak_bytes, ended.forked_from_bytes)
        ]
        remarks = program_ending.told_of(ended.left)
        if self._marked.left_out:
            remarks.append(f"of the phases it marks only the first {MOST_PHASES} are kept")
        self.result = Result(
            pinned=False,
            durations_s=(ended.at_s - self.started_at_s,),
            exit_code=os.WEXITSTATUS(ended.status) if os.WIFEXITED(ended.status) else None,
            had_children=ended.had_children,
            remarks=tuple(remarks),
        )
        if self.is_interrupted:
            self.status, self.message = "crashed", "interrupted"
        elif found := program_ending.judged(ended.status, said):
            self.status, self.message = found
        else:
            self.is_done = os.WIFEXITED(ended.status)

    def last_words(self) -> str:
        return program_ending.last_line(self.tail)


def _footprint(found: Figures, whole: PhaseReading, interval_s: float, *, had_children: bool) -> None:
    how: dict[str, Any] = {"source": "kernel's peak (VmHWM, ru_maxrss), under the script's own allocator",
                           "bound": whole.bound or "exact", "resolution_bytes": resolution_bytes(),
                           "children": False}  # fmt: skip
    if how["bound"] == "at most" and had_children:
        found.miss("peak_footprint_bytes", "script and children take less than what they were forked from")
        return
    if how["bound"] == "at least" or had_children:
        # The kernel tells the highest peak of any child that was waited for, too, however short it lived.
        how |= {"source": "kernel's peak (VmHWM, ru_maxrss); with children, their own pages (USS), sampled",
                "bound": "at least", "children": True, "interval_s": interval_s}  # fmt: skip
    found.know("peak_footprint_bytes", deriving.told(whole.peak_footprint_bytes), **how)


def _gpu_footprint(found: Figures, whole: PhaseReading, interval_s: float) -> None:
    """NVML's figure of the processes, or of the device above its idle level where the driver hides them."""
    peak_bytes, used_bytes = whole.gpu_process_peak_bytes, whole.gpu_used_peak_bytes
    source = "NVML per process, sampled"
    # A container has process ids of its own: what NVML shows under ours may be another's, and more than ours took.
    if peak_bytes is None or (used_bytes is not None and peak_bytes > used_bytes):
        peak_bytes = used_bytes
        source = "NVML: used memory of the device above its idle level, sampled; the driver hides the process"
    if peak_bytes is None:
        found.miss("peak_footprint_bytes", whole.gpu_unknown or "NVML shows neither the process nor the device")
    else:
        found.know("peak_footprint_bytes", peak_bytes, source, "at least", interval_s=interval_s)
    if whole.gpu_energy_j is not None:
        found.know("energy_j", whole.gpu_energy_j, "NVML's counter from the script's start to its end, whole device")
