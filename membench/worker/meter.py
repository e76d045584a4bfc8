"""Measures phases, and parts of a step, from inside the measured process, and tells the runner."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from membench.host import environment, procfs
from membench.worker import allocator

_T = TypeVar("_T")

# The kernel counts pages per core and may read some 0.1 MiB low; the highest of five steps comes close to the truth.
STEPS_FOR_MEMORY = 5

_GPU_PEAKS = ("cuda_peak_allocated_bytes", "cuda_peak_reserved_bytes")


class Meter:
    """Tells the runner when phases begin and end and what they took.

    The runner acknowledges both ends, so that what it reads from outside falls on the boundary.
    """

    def __init__(self, channel: socket.socket, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.memory_in_parts = False
        self.parts: dict[str, dict[str, Any]] = {}
        self.current_phase: str | None = None
        self.current_part: str | None = None
        self._look: Callable[[], None] | None = None
        self._device = device
        self._cores = environment.usable_cores()
        self._channel = channel
        self._answers = channel.makefile("rb")
        self._baseline = self._stretch_start = procfs.resident()
        self._highest: dict[str, int] = {}

    def tell(self, **message: Any) -> None:
        """Send the runner a message; it never waits for an answer."""
        self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _acknowledged(self, **message: Any) -> None:
        self.tell(**message)
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
        baseline = {"anonymous_bytes": self._baseline.anonymous_bytes, "file_bytes": self._baseline.file_bytes}
        self.tell(event="baseline", baseline=baseline)

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
        before = procfs.cores()
        began = time.perf_counter()
        returned = step()
        self.synchronize()
        duration_s = time.perf_counter() - began
        after = procfs.cores()
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
    def phase(self, name: str, allocator_name: str) -> Iterator[dict[str, Any]]:
        """Measure a phase: exact peaks while it runs, what is held once things have settled.

        Yields:
            what was measured, to which the caller may add.
        """
        self._settle()
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self.current_phase = name
        self._acknowledged(event="begin", phase=name)
        start = self._begin_stretch()
        began = time.perf_counter()
        measured: dict[str, Any] = {"name": name, "allocator": allocator_name}
        yield measured
        self.synchronize()
        measured["duration_s"] = time.perf_counter() - began
        end, _ = self._end_stretch()
        measured |= self._highest | {
            "file_start_bytes": start.file_bytes - self._baseline.file_bytes,
            "file_end_bytes": end.file_bytes - self._baseline.file_bytes,
        }
        self._highest = {}
        if self.on_gpu:
            self._raise_gpu_peaks(measured)
            for part in self.parts.values():
                for key in _GPU_PEAKS:
                    measured[key] = max(measured[key], part.get(key, 0))
        self._settle()
        settled = procfs.resident()
        measured["held_live_bytes"] = settled.anonymous_bytes - self._baseline.anonymous_bytes
        measured["held_footprint_bytes"] = settled.total_bytes - self._baseline.total_bytes
        if self.on_gpu:
            measured["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            measured["cuda_held_reserved_bytes"] = torch.cuda.memory_reserved(self._device)
        measured["parts"] = self.parts
        self.parts = {}
        self._acknowledged(event="end", phase=measured)

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
        entry = self.parts.setdefault(name, {"durations_s": []})
        self.current_part = name
        self.synchronize()
        if self.memory_in_parts:
            self._begin_memory_of_part()
        began = time.perf_counter()
        yield
        self.synchronize()
        entry["durations_s"].append(time.perf_counter() - began)
        if self._look:
            self._look()
        self.current_part = None
        if self.memory_in_parts:
            self._end_memory_of_part(entry)

    def _begin_memory_of_part(self) -> None:
        self._end_stretch()
        if self.on_gpu:
            # The peak since the last boundary belongs to what ran between the parts.
            self._raise_gpu_peaks(self.parts.setdefault("between", {"durations_s": []}))
        self._begin_stretch()

    def _end_memory_of_part(self, entry: dict[str, Any]) -> None:
        end, peaks = self._end_stretch()
        if "peak_live_bytes" not in entry or peaks["peak_live_bytes"] > entry["peak_live_bytes"]:
            entry |= peaks | {"file_end_bytes": end.file_bytes - self._baseline.file_bytes}
        entry["held_live_bytes"] = end.anonymous_bytes - self._baseline.anonymous_bytes
        self._begin_stretch()
        if self.on_gpu:
            import torch

            self._raise_gpu_peaks(entry)
            entry["cuda_held_allocated_bytes"] = torch.cuda.memory_allocated(self._device)

    def _raise_gpu_peaks(self, entry: dict[str, Any]) -> None:
        """Raise an entry's peaks to torch's own since the last look, and begin anew."""
        import torch

        peaks = (torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device))
        for key, peak_bytes in zip(_GPU_PEAKS, peaks, strict=True):
            entry[key] = max(peak_bytes, entry.get(key, 0))
        torch.cuda.reset_peak_memory_stats(self._device)
