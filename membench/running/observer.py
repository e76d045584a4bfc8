"""Sampling a measured process from outside: its memory, its GPU and its child processes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

from membench.host import procfs
from membench.host.load import WatchedWaiting
from membench.host.nvml import Gpu, GpuReading, Gpus
from membench.protocol.readings import PhaseReading
from membench.running.launched_ranks import LaunchedRanks
from membench.running.timeline import Sample, Timeline


@dataclass
class Observed:
    """The maxima of the samples since a phase began, by field of ``PhaseReading``."""

    samples: int = 0
    file_peak_bytes: int | None = None
    children_peak_bytes: int | None = None
    family_rss_bytes: int | None = None
    family_anonymous_bytes: int | None = None
    gpu_process_peak_bytes: int | None = None
    gpu_used_peak_bytes: int | None = None
    began_s: float | None = None
    ended_s: float | None = None
    gpu_energy_j: float | None = None
    gpu_process_end_bytes: int | None = None
    gpu_used_end_bytes: int | None = None
    gpu_unknown: str | None = None

    def add(self, sample: Sample) -> None:
        """Add a sample: raise each maximum that it exceeds."""
        self.samples += 1
        self.file_peak_bytes = _most(self.file_peak_bytes, sample.resident_bytes - sample.anonymous_bytes)
        self.children_peak_bytes = _most(self.children_peak_bytes, sample.children_bytes)
        self.gpu_process_peak_bytes = _most(self.gpu_process_peak_bytes, sample.gpu_process_bytes)
        self.gpu_used_peak_bytes = _most(self.gpu_used_peak_bytes, sample.gpu_used_bytes)
        if sample.children_bytes:
            # Sums are taken per sample: peaks of parent and child at different moments must not be added.
            self.family_rss_bytes = _most(self.family_rss_bytes, sample.held_bytes)
            together = sample.anonymous_bytes + sample.children_bytes
            self.family_anonymous_bytes = _most(self.family_anonymous_bytes, together)

    def complete(self, reading: PhaseReading) -> PhaseReading:
        """Return a worker's reading of a phase completed with these values."""
        return dataclasses.replace(reading, **vars(self))


def _most(a: int | None, b: int | None) -> int | None:
    return max((value for value in (a, b) if value is not None), default=None)


class Observer:
    """Samples a process and its descendants. Times are seconds since the first process of the job was started."""

    def __init__(
        self, pid: int, gpus: Gpus | None, idle_bytes: Mapping[str, int], timeline: Timeline, rank: int = 0
    ) -> None:
        """Open the process for sampling.

        Args:
            idle_bytes: used memory of each GPU, by UUID, before the process used one.
            timeline: the job's timeline, which stores the samples.
            rank: the rank of the process in its job.
        """
        self.pid, self._timeline, self._rank = pid, timeline, rank
        try:
            self._watch: procfs.Watch | None = procfs.Watch(pid)
        except FileNotFoundError:  # the process has ended already
            self._watch = None
        self._gpus = gpus
        self._idle_bytes = idle_bytes
        self._gpu: Gpu | None = None
        self._began = timeline.begin()
        self._reading: GpuReading | None = None
        self._energy_mj: int | None = None
        self._seen: Observed | None = None
        self._waiting: WatchedWaiting | None = None
        self._ranks: LaunchedRanks | None = None

    def watch_waiting(self) -> None:
        """Look from now on for how long threads of the process and its descendants wait for cores."""
        self._waiting = WatchedWaiting(self.pid)

    @property
    def waited_s(self) -> float | None:
        """Return for how long threads were seen to wait for cores, in seconds summed; ``None`` if not known."""
        return self._waiting.waited_s if self._waiting else None

    def watch_ranks(self) -> LaunchedRanks:
        """Look from now on for ranks among the descendants; the samples complete what is returned."""
        self._ranks = LaunchedRanks(self.pid)
        return self._ranks

    def use_gpu(self, uuid: str) -> str | None:
        """Include a GPU in the samples from now on; return the reason if it is not found."""
        if self._gpus is None:
            return "NVML is not available"
        self._gpu = self._gpus.find(uuid)
        return None if self._gpu else f"NVML knows no device with the UUID {uuid}"

    def use_gpu_of(self, device: str) -> str | None:
        """Include the GPU that a program sees as ``device`` (``cuda:1``); return the reason if it is not found."""
        if self._gpus is None:
            return "NVML is not available"
        self._gpu = self._gpus.of_device(device)
        return None if self._gpu else f"NVML knows no {device}"

    def close(self) -> None:
        """Stop sampling; collected values stay available."""
        if self._watch:
            self._watch.close()
            self._watch = None

    def sample(self) -> Sample | None:
        """Take a sample of the process and its descendants; return ``None`` once the process has ended."""
        if self._watch is None:
            return None
        try:
            resident, anonymous = self._watch.resident()
        except ProcessLookupError:
            return None
        descendants = self._watch.descendants()
        if self._waiting:
            self._waiting.look(descendants)
        if self._ranks:
            self._ranks.look(descendants, time.monotonic() - self._began)
        children = 0
        for child in descendants:
            try:
                children += procfs.unique_bytes(child)
            except OSError:
                continue
        self._reading = self._gpu.read({self.pid, *descendants}) if self._gpu else None
        process = self._reading.process_bytes if self._reading else None
        used = self._above_idle(self._reading.used_bytes) if self._reading else None
        sample = Sample(time.monotonic() - self._began, resident, anonymous, children, process, used)
        if self._seen:
            self._seen.add(sample)
        self._timeline.add(self._rank, sample)
        return sample

    def _above_idle(self, used_bytes: int | None) -> int | None:
        idle = self._idle_bytes.get(self._gpu.uuid) if self._gpu else None
        return None if idle is None or used_bytes is None else max(0, used_bytes - idle)

    def begin_phase(self) -> None:
        """Take a sample and start collecting values for a phase."""
        self._seen = Observed()
        self.sample()
        self._seen.began_s = time.monotonic() - self._began
        self._energy_mj = self._reading.energy_mj if self._reading else None

    def end_phase(self) -> Observed:
        """Take a sample and return the values collected since the phase began."""
        self.sample()
        assert self._seen is not None
        seen, self._seen = self._seen, None
        seen.ended_s = time.monotonic() - self._began
        ended_mj = self._reading.energy_mj if self._reading else None
        if self._energy_mj is not None and ended_mj is not None:
            seen.gpu_energy_j = (ended_mj - self._energy_mj) / 1000
        seen.gpu_process_end_bytes = self._reading.process_bytes if self._reading else None
        seen.gpu_used_end_bytes = self._above_idle(self._reading.used_bytes) if self._reading else None
        seen.gpu_unknown = self._reading.refusal if self._reading else None
        return seen
