"""Outside the worker: the timeline of its memory, and what a phase's ends and samples show of GPU and children."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.host import procfs
from membench.host.nvml import Gpu, GpuReading, Gpus

_MOST_SAMPLES = 2000


@dataclass(frozen=True)
class Sample:
    """One look, or the highest of several that were merged; ``None`` where there was nothing to read."""

    at_s: float
    resident_bytes: int
    anonymous_bytes: int
    children_bytes: int
    gpu_process_bytes: int | None
    gpu_used_bytes: int | None


class Observer:
    """Samples a process and its descendants. Seconds count from its start.

    At most 2,000 samples are kept, by merging neighbours into their maximum: a long case loses resolution, never a
    peak.
    """

    def __init__(self, pid: int, gpus: Gpus | None, idle_bytes: Mapping[str, int]) -> None:
        """``idle_bytes``: used memory of each GPU, by UUID, before the process touched one."""
        self.pid = pid
        try:
            self._watch: procfs.Watch | None = procfs.Watch(pid)
        except FileNotFoundError:  # it has ended already
            self._watch = None
        self._gpus = gpus
        self._idle_bytes = idle_bytes
        self._gpu: Gpu | None = None
        self._began = time.monotonic()
        self._per_sample, self._looks = 1, 0
        self._pending: Sample | None = None
        self._samples: list[Sample] = []
        self._reading: GpuReading | None = None
        self._phase: dict[str, Any] = {}

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

    def look(self) -> int | None:
        """Take a sample; what the worker and its children hold on the machine now, in bytes."""
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
        if self._phase:
            self._phase["samples"] += 1
            seen = {"children_peak_bytes": children, "file_peak_bytes": resident - anonymous,
                    "gpu_process_peak_bytes": process, "gpu_used_peak_bytes": used}  # fmt: skip
            if children:
                # At one moment: peaks of parent and child that lie apart must not be added.
                seen |= {"family_rss_bytes": resident + children, "family_anonymous_bytes": anonymous + children}
            for key, value in seen.items():
                if value is not None:
                    self._phase[key] = max(value, self._phase[key] or 0)
        self._keep(sample)
        return resident + children

    def _above_idle(self, used_bytes: int | None) -> int | None:
        idle = self._idle_bytes.get(self._gpu.uuid) if self._gpu else None
        return None if idle is None or used_bytes is None else max(0, used_bytes - idle)

    def begin_phase(self) -> None:
        """A phase begins: look, and collect what is seen from here on."""
        self._phase = {"samples": 0, "file_peak_bytes": None, "children_peak_bytes": None,
                       "family_rss_bytes": None, "family_anonymous_bytes": None, "gpu_process_peak_bytes": None,
                       "gpu_used_peak_bytes": None}  # fmt: skip
        self.look()
        self._phase["began_s"] = time.monotonic() - self._began
        self._phase["_energy_mj"] = self._reading.energy_mj if self._reading else None

    def end_phase(self) -> dict[str, Any]:
        """A phase ended: look, and say what was seen since it began."""
        self.look()
        seen, self._phase = self._phase, {}
        seen["ended_s"] = time.monotonic() - self._began
        begun_mj = seen.pop("_energy_mj")
        ended_mj = self._reading.energy_mj if self._reading else None
        seen["gpu_energy_j"] = None if begun_mj is None or ended_mj is None else (ended_mj - begun_mj) / 1000
        seen["gpu_process_end_bytes"] = self._reading.process_bytes if self._reading else None
        seen["gpu_used_end_bytes"] = self._above_idle(self._reading.used_bytes) if self._reading else None
        seen["gpu_unknown"] = self._reading.refusal if self._reading else None
        return seen

    def _keep(self, sample: Sample) -> None:
        self._looks += 1
        self._pending = sample if self._pending is None else _higher(self._pending, sample)
        if self._looks % self._per_sample:
            return
        self._samples.append(self._pending)
        self._pending = None
        if len(self._samples) >= _MOST_SAMPLES:
            self._per_sample *= 2
            odd = self._samples[len(self._samples) // 2 * 2 :]
            self._samples = [*map(_higher, self._samples[::2], self._samples[1::2]), *odd]

    def timeline(self) -> dict[str, list[float | int | None]]:
        """The samples as columns; a column of which nothing is known is left out."""
        samples = self._samples + ([self._pending] if self._pending else [])
        columns: dict[str, list[float | int | None]] = {
            "at_s": [round(sample.at_s, 4) for sample in samples],
            "rss_bytes": [sample.resident_bytes for sample in samples],
            "anonymous_bytes": [sample.anonymous_bytes for sample in samples],
            "children_unique_bytes": [sample.children_bytes for sample in samples],
            "gpu_process_bytes": [sample.gpu_process_bytes for sample in samples],
            "gpu_used_above_idle_bytes": [sample.gpu_used_bytes for sample in samples],
        }
        return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def _higher(first: Sample, second: Sample) -> Sample:
    """Two neighbours as one: the time of the higher, each figure's maximum."""

    def most(a: int | None, b: int | None) -> int | None:
        return max((value for value in (a, b) if value is not None), default=None)

    return Sample(
        first.at_s if first.resident_bytes >= second.resident_bytes else second.at_s,
        max(first.resident_bytes, second.resident_bytes),
        max(first.anonymous_bytes, second.anonymous_bytes),
        max(first.children_bytes, second.children_bytes),
        most(first.gpu_process_bytes, second.gpu_process_bytes),
        most(first.gpu_used_bytes, second.gpu_used_bytes),
    )
