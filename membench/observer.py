"""Outside the worker: the timeline of its memory. No torch."""

from __future__ import annotations

import time
from typing import Any

from membench import procfs

_MOST_SAMPLES = 2000
_CHILDREN_EVERY = 10


class Gpu:
    """What NVML says of one process on its devices, and why not where it says nothing."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def process_bytes(self, pid: int) -> int | None:
        """Memory of a process over all devices, or ``None`` where the driver hides it (containers often do)."""
        for device in self._devices:
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device):
                if process.pid == pid and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        return None

    def device_bytes(self) -> list[int]:
        """Used memory of each device, by PCI order; never summed."""
        return [int(self._nvml.nvmlDeviceGetMemoryInfo(device).used) for device in self._devices]


class Observer:
    """Samples a process and its descendants; keeps at most 2,000 samples by merging neighbours into their maximum."""

    def __init__(self, pid: int, gpu: Gpu | None) -> None:
        self.pid = pid
        self._gpu = gpu
        self._began = time.monotonic()
        self._every, self._count = 1, 0
        self._pending: tuple[float, int, int, int, int | None] | None = None
        self.samples: list[tuple[float, int, int, int, int | None]] = []
        self.children_peak_bytes = 0
        self._children: list[int] = []

    def look(self) -> int:
        """Take a sample; resident bytes now."""
        try:
            resident, anonymous = procfs.sample(self.pid)
        except (OSError, IndexError):
            return 0
        if self._count % _CHILDREN_EVERY == 0:
            self._children = procfs.children(self.pid)
        children = 0
        for child in self._children:
            try:
                children += procfs.unique_bytes(child)
            except OSError:
                continue
        self.children_peak_bytes = max(self.children_peak_bytes, children)
        gpu = self._gpu.process_bytes(self.pid) if self._gpu else None
        self._keep((time.monotonic() - self._began, resident, anonymous, children, gpu))
        return resident

    def _keep(self, sample: tuple[float, int, int, int, int | None]) -> None:
        self._count += 1
        pending = self._pending
        if pending is not None:
            sample = (pending[0], *(max(pair) for pair in zip(pending[1:4], sample[1:4], strict=True)), sample[4])  # type: ignore[assignment]
        self._pending = sample
        if self._count % self._every == 0:
            self.samples.append(sample)
            self._pending = None
        if len(self.samples) > _MOST_SAMPLES:
            self._every *= 2
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples = [a if a[1] >= b[1] else b for a, b in pairs]

    def timeline(self) -> dict[str, Any]:
        """The samples as columns."""
        columns = list(zip(*self.samples, strict=True)) or [()] * 5
        names = ("t_s", "rss_bytes", "anonymous_bytes", "children_unique_bytes", "gpu_process_bytes")
        return {name: list(column) for name, column in zip(names, columns, strict=True)}


def gpu_observer() -> tuple[Gpu | None, str | None]:
    """An NVML observer, or the reason why there is none."""
    import pynvml

    try:
        return Gpu(pynvml), None
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
