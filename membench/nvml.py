"""What NVML says of GPUs, from outside the measured process. No torch.

NVML counts devices by PCI bus and CUDA may count them otherwise or see only some, so a device is found by its UUID,
which the worker tells once its CUDA context stands.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuReading:
    """One look at a device.

    ``process_bytes`` is ``None`` where the driver does not show the processes (containers often hide them), and
    ``energy_mj``, counted since the driver was loaded, where the device has no counter.
    """

    process_bytes: int | None
    used_bytes: int
    energy_mj: int | None


class Gpus:
    """The machine's NVIDIA GPUs. ``nvml`` is the module ``pynvml``.

    Raises:
        pynvml.NVMLError: if there is no driver.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def describe(self) -> list[dict[str, Any]]:
        """Name, UUID, memory and driver of each device, in the order of the PCI bus."""
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return [
            {
                "name": self._nvml.nvmlDeviceGetName(handle),
                "uuid": self._nvml.nvmlDeviceGetUUID(handle),
                "memory_bytes": int(self._nvml.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": driver,
            }
            for handle in self._handles
        ]

    def used_bytes(self) -> dict[str, int]:
        """Used memory of each device by UUID; before a worker starts, its idle level. Never summed."""
        return {
            self._nvml.nvmlDeviceGetUUID(handle): int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            for handle in self._handles
        }

    def find(self, uuid: str) -> Gpu | None:
        """The device, or slice of one (MIG), of this UUID, with or without its prefix."""
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for candidate in (f"GPU-{bare}", f"MIG-{bare}"):
            try:
                return Gpu(self._nvml, self._nvml.nvmlDeviceGetHandleByUUID(candidate), candidate)
            except self._nvml.NVMLError:
                continue
        return None


class Gpu:
    """One device."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self.uuid = uuid

    def read(self, pids: Collection[int]) -> GpuReading:
        """What these processes hold on the device together, what is used in all, and the energy counter."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            processes = []
        shown = [int(p.usedGpuMemory) for p in processes if p.pid in pids and p.usedGpuMemory is not None]
        try:
            energy = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            energy = None
        used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return GpuReading(sum(shown) if shown else None, used, energy)


def gpus() -> tuple[Gpus | None, str | None]:
    """The GPUs, or the reason why none can be seen."""
    import pynvml

    try:
        return Gpus(pynvml), None
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
