"""Measurement of phases, and of parts of a step, from inside the measured process."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from membench.host import environment, procfs
from membench.host.device import Device
from membench.protocol.messages import BaselineTaken, Message, PhaseBegins, PhaseEnds, encode
from membench.protocol.readings import Baseline, PartReading, PhaseReading
from membench.protocol.requests import Rank
from membench.worker import allocator
from membench.worker.interval import Interval
from membench.worker.live_memory import LiveMemory, Pages

_T = TypeVar("_T")

STEPS_FOR_MEMORY = 5
"""The kernel counts pages per core, so a reading may be some 0.1 MiB too low; the maximum of five steps is accurate."""

_GPU_PEAKS = ("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes")


class Part:
    """A part of a step: the durations of its passes, and its peak memory over all passes."""

    def __init__(self) -> None:
        self.durations_s: list[float] = []
        self.memory: dict[str, int] = {}

    def reading(self) -> PartReading:
        return PartReading(durations_s=self.durations_s, **self.memory)


class Phase:
    """A phase that is being measured.

    Attributes:
        steps: the number of its steps, which the caller may set while it runs.
        reading: the measurement; ``None`` until the phase has ended.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self.reading: PhaseReading | None = None

    def peaks_of_parts(self) -> Mapping[str, PartReading]:
        """Return the readings of the parts of its steps."""
        assert self.reading is not None, "the phase has ended"
        return self.reading.parts


class Meter:
    """Measures phases and sends the readings to the runner.

    The runner acknowledges the begin and the end of each phase, so that its own readings from outside coincide with
    these boundaries.
    """

    def __init__(self, channel: socket.socket, rank: Rank) -> None:
        self.on_gpu = Device.parse(rank.device).on_gpu
        self.memory_in_parts = False
        self.parts: dict[str, Part] = {}
        self.current_phase: str | None = None
        self.current_part: str | None = None
        # The ranks of a job are children of one fork server; the cores that they use are not lost to other processes.
        self.family = os.getppid() if rank.of > 1 else None
        self._sample: Callable[[], None] | None = None
        self._device = rank.device
        self._cores = environment.usable_cores()
        self._channel = channel
        self._answers = channel.makefile("rb")
        self._live = LiveMemory()
        self._baseline = self._live.pages()
        self._free_at_baseline_bytes = 0
        self._interval = Interval(self._baseline)
        self._highest: dict[str, int] = {}
        self._aside_s = 0.0
        self.most_garbage_bytes = 0

    def send(self, message: Message) -> None:
        """Send a message to the runner, without waiting for an answer."""
        self._channel.sendall(encode(message))

    def _send_and_wait(self, message: Message) -> None:
        self.send(message)
        self._answers.readline()

    def synchronize(self) -> None:
        """Wait for the GPU, if the case runs on one. It precedes each reading of a clock or a counter."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self._device)

    def set_baseline(self) -> None:
        """Take the baseline: the memory of the interpreter, the libraries and the harness."""
        self._rehearse()
        self._settle()
        self._live.begin_at_baseline()
        self._baseline = self._live.pages_one_by_one()
        self._free_at_baseline_bytes = self._live.free_bytes
        self.send(BaselineTaken(Baseline(self._baseline.anonymous_bytes, self._baseline.file_bytes)))

    def _rehearse(self) -> None:
        """Do once what the end of a phase does, so that its first-time memory is in no figure."""
        self._begin_interval()
        self._end_interval()
        self._highest = {}
        self._live.free_in_heap_bytes()
        self._live.pages_one_by_one()
        encode(PhaseEnds(PhaseReading(name="", allocator=allocator.state("pinned"))))

    def _settle(self) -> None:
        self._live.settle()
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def held_live_bytes(self) -> int:
        """Return the current live memory above the baseline."""
        if self.on_gpu:
            import torch

            return torch.cuda.memory_allocated(self._device)
        return self._live.pages().anonymous_bytes - self._not_live_bytes

    @property
    def _not_live_bytes(self) -> int:
        """Anonymous pages of the baseline, and those that were free when the process last settled."""
        return self._baseline.anonymous_bytes + self._live.free_bytes - self._free_at_baseline_bytes

    def timed(self, step: Callable[[], _T]) -> tuple[_T, float, float | None]:
        """Run and time a step.

        Returns:
            what the step returns; its duration in seconds; and for how long its threads, all together, waited for cores
            that other processes used, in seconds, or ``None`` if the kernel does not report it.
        """
        self.synchronize()
        before = procfs.cores(self.family)
        began = time.perf_counter()
        returned = step()
        self.synchronize()
        duration_s = time.perf_counter() - began
        return returned, duration_s, self._waited_s(before, duration_s)

    def _waited_s(self, before: procfs.Cores | None, duration_s: float) -> float | None:
        after = procfs.cores(self.family)
        if before is None or after is None:
            return None
        return after.waited_for_others_s(before, duration_s, self._cores)

    @contextlib.contextmanager
    def sampling_parts(self, sample: Callable[[], None]) -> Iterator[None]:
        """Call a function at the end of each part of the steps that run in this context."""
        self._sample = sample
        yield
        self._sample = None

    @contextlib.contextmanager
    def phase(self, name: str, allocator_name: str) -> Iterator[Phase]:
        """Measure a phase: its exact peaks, and the memory that is held after garbage collection at its end.

        Args:
            allocator_name: the state of the allocator for the record, if it is one that can be pinned.
        """
        self._settle()
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self.current_phase = name
        self._send_and_wait(PhaseBegins(name))
        cores = procfs.cores(self.family)
        start = self._begin_interval()
        free_bytes = self._live.free_bytes - self._free_at_baseline_bytes
        self._aside_s = 0.0
        began = time.perf_counter()
        phase = Phase()
        yield phase
        self.synchronize()
        duration_s = time.perf_counter() - began - self._aside_s
        end, _ = self._end_interval()
        waited_s = self._waited_s(cores, duration_s)
        measured: dict[str, Any] = self._highest | {
            "file_start_bytes": start.file_bytes - self._baseline.file_bytes,
            "file_end_bytes": end.file_bytes - self._baseline.file_bytes,
        }
        self._highest = {}
        # What was freed into new holes of the heap may be in the peak.
        measured["peak_live_at_least_bytes"] -= max(0, self._live.free_in_heap_bytes() - self._live.holes_bytes)
        measured["free_bytes"] = free_bytes
        if self.on_gpu:
            self._update_gpu_peaks(measured)
            for part in self.parts.values():
                for key in _GPU_PEAKS:
                    measured[key] = max(measured[key], part.memory.get(key, 0))
        self._settle()
        settled = self._live.pages_one_by_one()
        measured["held_live_bytes"] = settled.anonymous_bytes - self._not_live_bytes
        # Counted page by page, it may be some kB more than the kernel's counters had at the peak.
        measured["peak_live_bytes"] = max(measured["peak_live_bytes"], measured["held_live_bytes"])
        measured["held_footprint_bytes"] = settled.total_bytes - self._baseline.total_bytes
        if self.on_gpu:
            measured["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            measured["cuda_held_reserved_bytes"] = torch.cuda.memory_reserved(self._device)
        parts, self.parts = self.parts, {}
        phase.reading = PhaseReading(
            name=name,
            allocator=allocator.state(allocator_name),
            duration_s=duration_s,
            steps=phase.steps,
            waited_s=waited_s,
            parts={part_name: part.reading() for part_name, part in parts.items()},
            **measured,
        )
        self._send_and_wait(PhaseEnds(phase.reading))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave work of the harness's own, within a phase, out of the phase's memory and duration."""
        self.synchronize()
        began = time.perf_counter()
        self._end_interval()
        yield
        self._live.count_free()
        self._begin_interval()
        self._aside_s += time.perf_counter() - began

    def separate_step(self) -> None:
        """Collect the garbage of earlier steps and what they left free, so that it is no memory of the next one."""
        self._end_interval()
        held_bytes = self.held_live_bytes()
        gc.collect()
        self.most_garbage_bytes = max(self.most_garbage_bytes, held_bytes - self.held_live_bytes())
        self._live.count_free()
        self._begin_interval()

    def _begin_interval(self) -> Pages:
        """Begin an interval between two boundaries of phases or parts; return the memory at its begin."""
        start = self._live.pages()
        self._interval = Interval(start)
        procfs.reset_peak()
        return start

    def _end_interval(self) -> tuple[Pages, dict[str, int]]:
        """End an interval, and include its peaks in those of the phase.

        Returns:
            the memory at the end of the interval, and the peaks in it above the baseline.
        """
        base, end = self._baseline, self._live.pages()
        least_bytes, most_bytes = self._interval.anonymous_peak(end)
        peaks = {
            "peak_live_bytes": most_bytes - self._not_live_bytes,
            "peak_live_at_least_bytes": least_bytes - self._not_live_bytes,
            # What fills holes of the heap does not show.
            "peak_live_at_most_bytes": most_bytes - self._not_live_bytes + self._live.holes_bytes,
            "file_most_bytes": max(self._interval.start.file_bytes, end.file_bytes) - base.file_bytes,
            "peak_footprint_bytes": self._interval.peak(end) - base.total_bytes,
        }
        self._highest = {key: max(value, self._highest.get(key, value)) for key, value in peaks.items()}
        return end, peaks

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part of a step: its duration, and its memory while ``memory_in_parts`` is set."""
        entry = self.parts.setdefault(name, Part())
        self.current_part = name
        self.synchronize()
        if self.memory_in_parts:
            self._begin_memory_of_part()
        began = time.perf_counter()
        yield
        self.synchronize()
        entry.durations_s.append(time.perf_counter() - began)
        if self._sample:
            self._sample()
        self.current_part = None
        if self.memory_in_parts:
            self._end_memory_of_part(entry.memory)

    def _begin_memory_of_part(self) -> None:
        self._end_interval()
        if self.on_gpu:
            # The peak since the last boundary belongs to the code that ran between the parts.
            self._update_gpu_peaks(self.parts.setdefault("between", Part()).memory)
        self._begin_interval()

    def _end_memory_of_part(self, memory: dict[str, int]) -> None:
        end, peaks = self._end_interval()
        if "peak_live_bytes" not in memory or peaks["peak_live_bytes"] > memory["peak_live_bytes"]:
            memory |= peaks | {"file_end_bytes": end.file_bytes - self._baseline.file_bytes}
        memory["held_live_bytes"] = end.anonymous_bytes - self._not_live_bytes
        self._begin_interval()
        if self.on_gpu:
            import torch

            self._update_gpu_peaks(memory)
            memory["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)

    def _update_gpu_peaks(self, memory: dict[str, int]) -> None:
        """Include torch's peaks since the last call in an entry's peaks, and reset them."""
        import torch

        peaks = (torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device))
        for key, peak_bytes in zip(_GPU_PEAKS, peaks, strict=True):
            memory[key] = max(peak_bytes, memory.get(key, 0))
        torch.cuda.reset_peak_memory_stats(self._device)
