"""The job ``script``: an unchanged user's program, with the phases that it marks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from membench.host import environment, last_words, procfs
from membench.host.device import Device
from membench.protocol.case import Case
from membench.protocol.forking import StartProgram, WorkerEnded
from membench.protocol.messages import BrokenMessage, MarkEntered, MarkLeft, Message, PhaseBegins, PhaseEnds, Result
from membench.protocol.readings import PhaseReading, ProcessReading
from membench.running import deriving, over_ranks, program_ending
from membench.running.derived_metrics import DerivedMetrics, resolution_bytes
from membench.running.deriving import JobReadings
from membench.running.jobs import rank_variables
from membench.running.jobs.case import case_names
from membench.running.jobs.runnable import RunnableJob
from membench.running.marked_phases import MOST_PHASES, WHOLE, MarkedPhases
from membench.running.observer import Observer
from membench.running.rank import Rank, Tell
from membench.running.references import References

NO_LIVE = "a script keeps its own allocator: what it freed and still holds cannot be told from what it uses"
_STREAMS = (0, 1)
_GRACE_S = 0.5
"""Seconds that child processes have to end by themselves, such as the helpers of multiprocessing."""


@dataclass(frozen=True, kw_only=True)
class ScriptJob(RunnableJob):
    """A user's program, measured with its interpreter."""

    streams: ClassVar = _STREAMS

    case: Case

    @property
    def names(self) -> Mapping[str, Any]:
        return case_names(self.case)

    @property
    def threads(self) -> int | None:
        return None

    def rank(self, number: int, tell: Tell) -> Rank:
        device = self.device
        is_bound = device.in_ranks and rank_variables.uses_one_thread(device.count)
        notes = (rank_variables.ONE_THREAD,) if is_bound else ()
        return _Program(number, device.ranks[number], tell, notes)

    def order(self, number: int, references: References) -> StartProgram:
        del references
        assert self.case.command is not None
        of = self.device.count
        variables = rank_variables.variables(number, of, self._meeting) if self.device.in_ranks else {}
        return StartProgram(self.case.command, number, _GRACE_S, variables)

    @functools.cached_property
    def _meeting(self) -> rank_variables.Meeting:
        return rank_variables.Meeting.new()

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        """Derive the metrics up to the end of the program, however it ended; no baseline is subtracted."""
        ranks = [self._derive_rank(readings, process, result) for process, result in readings.ranks]
        if not self.device.in_ranks:
            return ranks[0]
        found = over_ranks.combine(ranks)
        over_ranks.add_total_footprint(found, ranks)
        return found

    def _derive_rank(self, readings: JobReadings, process: ProcessReading, result: Result | None) -> DerivedMetrics:
        found = DerivedMetrics()
        found.add_unknown("peak_live_bytes", NO_LIVE)
        if not process.phases or result is None:
            for name in ("peak_footprint_bytes", "step_median_s"):
                found.add_unknown(name, f"the case ended as {readings.status}")
            return found
        whole = process.phases[0]
        if readings.on_gpu:
            _gpu_footprint(found, whole, readings.interval_s)
        else:
            _footprint(found, whole, readings.interval_s, had_children=result.had_children)
        deriving.children(found, process.phases, readings.interval_s)
        if readings.status == "ok":
            found.add("step_median_s", result.durations_s[0], "monotonic clock, from the script's start to its end")
        else:
            found.add_unknown("step_median_s", f"the case ended as {readings.status}")
        return found


class _Program(Rank):
    """A running program: it marks phases, and its output is passed on to the user."""

    role = "script"
    reads_output_to_end = True
    keeps_record_on_interrupt = True

    def __init__(self, number: int, device: Device, tell: Tell, notes: tuple[str, ...] = ()) -> None:
        """Prepare a program that is not started yet; ``notes`` are for its record."""
        super().__init__(number, device, tell)
        self._notes = notes
        self._ranks: tuple[ProcessReading, ...] = ()

    def on_start(self, observer: Observer, no_gpus: str | None, at_s: float) -> None:
        super().on_start(observer, no_gpus, at_s)
        if self.device.on_gpu:
            self._gpu_unknown = no_gpus or observer.use_gpu_of(str(self.device))
        self._marked = MarkedPhases(observer.pid, observer)
        observer.watch_waiting()
        self._launched = observer.watch_ranks()

    def handle(self, message: Message) -> None:
        match message:
            case MarkEntered():
                self._tell("phase", {"phase": self._marked.enter(message.phase)})
            case MarkLeft():
                self._marked.leave(message.phase, message.raised)
            case _:
                raise BrokenMessage("a program's pipe is for marks of phases alone; it sent something else")

    def check_order(self, message: PhaseBegins | PhaseEnds) -> None:
        self.handle(message)

    def add_output(self, data: bytes) -> None:
        super().add_output(data)
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(2, data) :]

    def on_end(self, ended: WorkerEnded, *, kernel_killed: bool) -> None:
        """Set the phases and the result, and the status unless a signal or the time limit ended the program."""
        highest_bytes = ended.peak_bytes if ended.status == 0 and ended.had_children else None
        self._ranks = self._launched.readings(str(self.device), WHOLE, highest_bytes)
        words = last_words.of(self.said)
        self.phase = self._marked.ended_in(words.line)
        self.phases = [
            dataclasses.replace(phase, gpu_unknown=phase.gpu_unknown or self._gpu_unknown)
            for phase in self._marked.end(ended.at_s, ended.peak_bytes, ended.inherited_peak_bytes)
        ]
        remarks = program_ending.leftover_remarks(ended.left)
        if self._marked.left_out:
            remarks.append(f"of the phases it marks only the first {MOST_PHASES} are kept")
        duration_s = ended.at_s - self.started_at_s
        waited_s = self._waited_for_others_s(ended, duration_s)
        self.result = Result(
            pinned=False,
            durations_s=(duration_s,),
            waited_s=None if waited_s is None else (waited_s,),
            exit_code=os.WEXITSTATUS(ended.status) if os.WIFEXITED(ended.status) else None,
            had_children=ended.had_children,
            remarks=tuple(remarks),
            notes=self._notes,
        )
        if self.is_interrupted:
            self.status, self.message = "crashed", "interrupted"
        elif self.status is not None:
            pass  # it was ended for what it sent
        elif found := program_ending.outcome(ended.status, words, self.said, kernel_killed=kernel_killed):
            self.status, self.message = found
        else:
            self.is_done = os.WIFEXITED(ended.status)

    def _waited_for_others_s(self, ended: WorkerEnded, duration_s: float) -> float | None:
        """Return how much of the waiting for cores other processes can have caused; ``None`` if it is not known."""
        waited_s = self.observer.waited_s
        if waited_s is None:
            return None
        return procfs.Cores(waited_s, ended.used_s).waited_for_others_s(
            procfs.Cores(0.0, 0.0), duration_s, environment.usable_cores()
        )

    def launched(self) -> tuple[ProcessReading, ...]:
        return self._ranks

    def ended_well(self, ended: WorkerEnded) -> bool:
        return ended.status == 0

    @property
    def says_where_it_is(self) -> bool:
        return False  # the signal is its own

    @property
    def blames_another(self) -> bool:
        return self.status in (None, "failed") and last_words.are_of_another(last_words.of(self.said).line)

    def last_line(self) -> str:
        if self.status in ("failed", "out-of-memory"):
            return last_words.of(self.said).line
        return last_words.last_line(self.said)


def _footprint(found: DerivedMetrics, whole: PhaseReading, interval_s: float, *, had_children: bool) -> None:
    how: dict[str, Any] = {"source": "kernel's peak (VmHWM, ru_maxrss), under the script's own allocator",
                           "bound": whole.bound or "exact", "resolution_bytes": resolution_bytes(),
                           "children": False}  # fmt: skip
    if how["bound"] == "at most" and had_children:
        found.add_unknown("peak_footprint_bytes", "script and children take less than what they were forked from")
        return
    if how["bound"] == "at least" or had_children:
        # The kernel's peak includes the largest child that was waited for, even a short-lived one.
        how |= {"source": "kernel's peak (VmHWM, ru_maxrss); with children, their own pages (USS), sampled",
                "bound": "at least", "children": True, "interval_s": interval_s}  # fmt: skip
    found.add("peak_footprint_bytes", deriving.require(whole.peak_footprint_bytes), **how)


def _gpu_footprint(found: DerivedMetrics, whole: PhaseReading, interval_s: float) -> None:
    """Add the footprint on a GPU: of the processes, or of the device above its idle level if the driver hides them."""
    peak_bytes, used_bytes = whole.gpu_process_peak_bytes, whole.gpu_used_peak_bytes
    source = "NVML per process, sampled"
    # Inside a container, NVML may list another process under our id, with more memory than ours uses.
    if peak_bytes is None or (used_bytes is not None and peak_bytes > used_bytes):
        peak_bytes = used_bytes
        source = "NVML: used memory of the device above its idle level, sampled; the driver hides the process"
    if peak_bytes is None:
        found.add_unknown("peak_footprint_bytes", whole.gpu_unknown or "NVML shows neither the process nor the device")
    else:
        found.add("peak_footprint_bytes", peak_bytes, source, "at least", interval_s=interval_s)
    if whole.gpu_energy_j is not None:
        found.add("energy_j", whole.gpu_energy_j, "NVML's counter from the script's start to its end, whole device")
