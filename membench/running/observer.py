"""Outside the worker: what a phase's ends and samples show of its memory, its GPU and its children."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

from membench.host import procfs
from membench.host.nvml import Gpu, GpuReading, Gpus
from membench.protocol.readings import PhaseReading
from membench.running.timeline import Sample, Timeline


@dataclass
class Seen:
    """What samples saw since a phase began, by the names that ``PhaseReading`` has for it."""

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

    def raise_to(self, sample: Sample) -> None:
        """Take a sample up, where it is higher than those before."""
        self.samples += 1
        self.file_peak_bytes = _most(self.file_peak_bytes, sample.resident_bytes - sample.anonymous_bytes)
        self.children_peak_bytes = _most(self.children_peak_bytes, sample.children_bytes)
        self.gpu_process_peak_bytes = _most(self.gpu_process_peak_bytes, sample.gpu_process_bytes)
        self.gpu_used_peak_bytes = _most(self.gpu_used_peak_bytes, sample.gpu_used_bytes)
        if sample.children_bytes:
            # At one moment: peaks of parent and child that lie apart must not be added.
            self.family_rss_bytes = _most(self.family_rss_bytes, sample.held_bytes)
            together = sample.anonymous_bytes + sample.children_bytes
            self.family_anonymous_bytes = _most(self.family_anonymous_bytes, together)

    def complete(self, reading: PhaseReading) -> PhaseReading:
        """A phase as the worker read it, with what was seen from outside."""
        return dataclasses.replace(reading, **vars(self))


def _most(a: int | None, b: int | None) -> int | None:
    return max((value for value in (a, b) if value is not None), default=None)


class Observer:
    """Samples a process and its descendants. Seconds count from its start."""

    def __init__(
        self, pid: int, gpus: Gpus | None, idle_bytes: Mapping[str, int], timeline: Timeline, rank: int = 0
    ) -> None:
        """Make ready to look.

        Args:
            idle_bytes: used memory of each GPU, by UUID, before the process touched one.
            timeline: of the job, which keeps the samples.
            rank: which of the job's processes this is.
        """
        self.pid, self._timeline, self._rank = pid, timeline, rank
        try:
            self._watch: procfs.Watch | None = procfs.Watch(pid)
        except FileNotFoundError:  # it has ended already
            self._watch = None
        self._gpus = gpus
        self._idle_bytes = idle_bytes
        self._gpu: Gpu | None = None
        self._began = time.monotonic()
        self._reading: GpuReading | None = None
        self._energy_mj: int | None = None
        self._seen: Seen | None = None

    def use_gpu(self, uuid: str) -> str | None:
        """Look at this device from now on; the reason if it cannot be found."""
        if self._gpus is None:
            return "NVML is not available"
        self._gpu = self._gpus.find(uuid)
        return None if self._gpu else f"NVML knows no device with the UUID {uuid}"

    def use_gpu_of(self, device: str) -> str | None:
        """Look at the device that ``cuda:1`` means to a program; the reason if it cannot be found."""
        if self._gpus is None:
            return "NVML is not available"
        self._gpu = self._gpus.of_device(device)
        return None if self._gpu else f"NVML knows no {device}"

    def close(self) -> None:
        """Look no more; what was seen can still be asked for."""
        if self._watch:
            self._watch.close()
            self._watch = None

    def look(self) -> Sample | None:
        """Take a sample of what the process and its children hold now; ``None`` once it has ended."""
        if self._watch is None:
            return None
        try:
            resident, anonymous = self._watch.resident()
        except ProcessLookupError:
            return None
        descendants = self._watch.descendants()
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
            self._seen.raise_to(sample)
        self._timeline.add(self._rank, sample)
        return sample

    def _above_idle(self, used_bytes: int | None) -> int | None:
        idle = self._idle_bytes.get(self._gpu.uuid) if self._gpu else None
        return None if idle is None or used_bytes is None else max(0, used_bytes - idle)

    def begin_phase(self) -> None:
        """A phase begins: look, and collect what is seen from here on."""
        self._seen = Seen()
        self.look()
        self._seen.began_s = time.monotonic() - self._began
        self._energy_mj = self._reading.energy_mj if self._reading else None

    def end_phase(self) -> Seen:
        """A phase ended: look, and return what was seen since it began."""
        self.look()
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
