"""Measures phases, and parts of a step, from inside the measured process, and says so to the runner."""

from __future__ import annotations

import contextlib
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

_T = TypeVar("_T")

# The kernel counts pages per core and may read some 0.1 MiB low; the highest of five steps comes close to the truth.
STEPS_FOR_MEMORY = 5

_GPU_PEAKS = ("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes")


class Timing:
    """The durations of timed steps, and for how long their threads waited for cores that others had."""

    def __init__(self) -> None:
        self.durations_s: list[float] = []
        self._waited_s: list[float | None] = []

    def take_up(self, timed: tuple[_T, float, float | None]) -> _T:
        """Keep what ``Meter.timed`` says of a step; what the step returned."""
        returned, duration_s, waited_s = timed
        self.durations_s.append(duration_s)
        self._waited_s.append(waited_s)
        return returned

    @property
    def waited_s(self) -> list[float] | None:
        """Of each step; ``None`` where the kernel does not tell of one."""
        known = [waited_s for waited_s in self._waited_s if waited_s is not None]
        return known if len(known) == len(self._waited_s) else None


class Part:
    """A part of a step: the durations of its passes, and the highest that was read of its memory."""

    def __init__(self) -> None:
        self.durations_s: list[float] = []
        self.memory: dict[str, int] = {}

    def reading(self) -> PartReading:
        return PartReading(durations_s=self.durations_s, **self.memory)


class Phase:
    """A phase under way. ``steps`` may be set meanwhile; ``reading`` is there once it has ended."""

    def __init__(self) -> None:
        self.steps: int | None = None
        self.reading: PhaseReading | None = None

    def peaks_of_parts(self) -> Mapping[str, PartReading]:
        """What was read of the parts of its steps."""
        assert self.reading is not None, "the phase has ended"
        return self.reading.parts


class Meter:
    """Says to the runner when phases begin and end and what they took.

    The runner acknowledges both ends, so that what it reads from outside falls on the boundary.
    """

    def __init__(self, channel: socket.socket, rank: Rank) -> None:
        self.on_gpu = Device.parse(rank.device).on_gpu
        self.memory_in_parts = False
        self.parts: dict[str, Part] = {}
        self.current_phase: str | None = None
        self.current_part: str | None = None
        self._look: Callable[[], None] | None = None
        self._device = rank.device
        self._cores = environment.usable_cores()
        # The ranks of a job are children of one fork server: what they use of the cores, no stranger has.
        self._family = os.getppid() if rank.of > 1 else None
        self._channel = channel
        self._answers = channel.makefile("rb")
        self._baseline = self._stretch_start = procfs.resident()
        self._highest: dict[str, int] = {}

    def tell(self, message: Message) -> None:
        """Send the runner a message; it never waits for an answer."""
        self._channel.sendall(encode(message))

    def _acknowledged(self, message: Message) -> None:
        self.tell(message)
        self._answers.readline()

    def synchronize(self) -> None:
        """Wait for the GPU, if the case runs on one: before every look at a clock or a counter."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self._device)

    def set_baseline(self) -> None:
        """What is resident now belongs to the interpreter, the libraries and the harness."""
        self._settle()
        self._baseline = procfs.resident()
        self.tell(BaselineTaken(Baseline(self._baseline.anonymous_bytes, self._baseline.file_bytes)))

    def _settle(self) -> None:
        allocator.settle()
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def held_live_bytes(self) -> int:
        """Live memory at this moment, above the baseline."""
        if self.on_gpu:
            import torch

            return torch.cuda.memory_allocated(self._device)
        return procfs.resident().anonymous_bytes - self._baseline.anonymous_bytes

    def timed(self, step: Callable[[], _T]) -> tuple[_T, float, float | None]:
        """What a step returns, its duration, and of that what its threads waited for cores that others had, all
        together; in seconds.
        """
        self.synchronize()
        before = procfs.cores(self._family)
        began = time.perf_counter()
        returned = step()
        self.synchronize()
        duration_s = time.perf_counter() - began
        after = procfs.cores(self._family)
        if before is None or after is None:
            return returned, duration_s, None
        return returned, duration_s, after.waited_for_others_s(before, duration_s, self._cores)

    @contextlib.contextmanager
    def looking(self, look: Callable[[], None]) -> Iterator[None]:
        """Call ``look`` at the end of each part of a step."""
        self._look = look
        yield
        self._look = None

    @contextlib.contextmanager
    def phase(self, name: str, allocator_name: str) -> Iterator[Phase]:
        """Measure a phase: exact peaks while it runs, what is held once things have settled."""
        self._settle()
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self.current_phase = name
        self._acknowledged(PhaseBegins(name))
        start = self._begin_stretch()
        began = time.perf_counter()
        phase = Phase()
        yield phase
        self.synchronize()
        duration_s = time.perf_counter() - began
        end, _ = self._end_stretch()
        measured: dict[str, Any] = self._highest | {
            "file_start_bytes": start.file_bytes - self._baseline.file_bytes,
            "file_end_bytes": end.file_bytes - self._baseline.file_bytes,
        }
        self._highest = {}
        if self.on_gpu:
            self._raise_gpu_peaks(measured)
            for part in self.parts.values():
                for key in _GPU_PEAKS:
                    measured[key] = max(measured[key], part.memory.get(key, 0))
        self._settle()
        settled = procfs.resident()
        measured["held_live_bytes"] = settled.anonymous_bytes - self._baseline.anonymous_bytes
        measured["held_footprint_bytes"] = settled.total_bytes - self._baseline.total_bytes
        if self.on_gpu:
            measured["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            measured["cuda_held_reserved_bytes"] = torch.cuda.memory_reserved(self._device)
        parts, self.parts = self.parts, {}
        phase.reading = PhaseReading(
            name=name,
            allocator=allocator_name,
            duration_s=duration_s,
            steps=phase.steps,
            parts={of: part.reading() for of, part in parts.items()},
            **measured,
        )
        self._acknowledged(PhaseEnds(phase.reading))

    def _begin_stretch(self) -> procfs.Resident:
        """Begin what lies between two boundaries, be they of phases or of parts; how it begins."""
        self._stretch_start = procfs.resident()
        procfs.reset_peak()
        return self._stretch_start

    def _end_stretch(self) -> tuple[procfs.Resident, dict[str, int]]:
        """How the stretch ends, and its peaks; the phase's are the highest of its stretches.

        The kernel knows the peak of all pages; less the file pages at the stretch's two ends brackets the live part.
        """
        base, start, end = self._baseline, self._stretch_start, procfs.resident()
        fewest, most = sorted((start.file_bytes, end.file_bytes))
        lowest = max(end.peak_bytes - most, start.anonymous_bytes, end.anonymous_bytes)
        peaks = {
            "peak_live_bytes": max(end.peak_bytes - fewest, lowest) - base.anonymous_bytes,
            "peak_live_at_least_bytes": lowest - base.anonymous_bytes,
            "file_most_bytes": most - base.file_bytes,
            "peak_footprint_bytes": max(end.peak_bytes, start.total_bytes, end.total_bytes) - base.total_bytes,
        }
        self._highest = {key: max(value, self._highest.get(key, value)) for key, value in peaks.items()}
        return end, peaks

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Mark a part of a step: its duration, and in ``load`` and ``run`` its memory."""
        entry = self.parts.setdefault(name, Part())
        self.current_part = name
        self.synchronize()
        if self.memory_in_parts:
            self._begin_memory_of_part()
        began = time.perf_counter()
        yield
        self.synchronize()
        entry.durations_s.append(time.perf_counter() - began)
        if self._look:
            self._look()
        self.current_part = None
        if self.memory_in_parts:
            self._end_memory_of_part(entry.memory)

    def _begin_memory_of_part(self) -> None:
        self._end_stretch()
        if self.on_gpu:
            # The peak since the last boundary belongs to what ran between the parts.
            self._raise_gpu_peaks(self.parts.setdefault("between", Part()).memory)
        self._begin_stretch()

    def _end_memory_of_part(self, memory: dict[str, int]) -> None:
        end, peaks = self._end_stretch()
        if "peak_live_bytes" not in memory or peaks["peak_live_bytes"] > memory["peak_live_bytes"]:
            memory |= peaks | {"file_end_bytes": end.file_bytes - self._baseline.file_bytes}
        memory["held_live_bytes"] = end.anonymous_bytes - self._baseline.anonymous_bytes
        self._begin_stretch()
        if self.on_gpu:
            import torch

            self._raise_gpu_peaks(memory)
            memory["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)

    def _raise_gpu_peaks(self, memory: dict[str, int]) -> None:
        """Raise an entry's peaks to torch's own since the last look, and begin anew."""
        import torch

        peaks = (torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device))
        for key, peak_bytes in zip(_GPU_PEAKS, peaks, strict=True):
            memory[key] = max(peak_bytes, memory.get(key, 0))
        torch.cuda.reset_peak_memory_stats(self._device)
