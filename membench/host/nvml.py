"""What NVML says of GPUs, from outside the measured process. No torch.

NVML counts devices by PCI bus and CUDA may count them otherwise or see only some, so a device is found by its UUID,
which the worker tells once its CUDA context stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuReading:
    """One look at a device.

    ``process_bytes`` is ``None`` where the driver does not show the processes (containers often hide them),
    ``used_bytes`` where it refuses to say, and ``energy_mj``, counted since the driver was loaded, where the device
    has no counter. ``refusal`` is what the driver said when it did not tell the used memory.
    """

    process_bytes: int | None
    used_bytes: int | None
    energy_mj: int | None
    refusal: str | None = None


class Gpus:
    """The machine's NVIDIA GPUs. ``nvml`` is the module ``pynvml``.

    A driver may refuse any single question (a lost device, a virtual GPU, missing rights): what it does not answer is
    ``None``.

    Raises:
        pynvml.NVMLError: if there is no driver.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle, _ = self._ask(nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                self._handles.append(handle)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
        return _ask(self._nvml, question, *arguments)

    def describe(self) -> list[dict[str, Any]]:
        """Name, UUID, memory and driver of each device, in the order of the PCI bus; ``refused`` says what of it the
        driver did not tell, and why.
        """
        nvml, devices = self._nvml, []
        driver = self._ask(nvml.nvmlSystemGetDriverVersion)
        for handle in self._handles:
            memory, refusal = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            answers = {
                "name": self._ask(nvml.nvmlDeviceGetName, handle),
                "uuid": self._ask(nvml.nvmlDeviceGetUUID, handle),
                "memory_bytes": (None if memory is None else int(memory.total), refusal),
                "driver": driver,
            }
            device: dict[str, Any] = {key: answer for key, (answer, _) in answers.items()}
            refused = {key: reason for key, (_, reason) in answers.items() if reason}
            devices.append(device | ({"refused": refused} if refused else {}))
        return devices

    def used_bytes(self) -> dict[str, int]:
        """Used memory by UUID of each device that tells it; before a worker starts, its idle level. Never summed."""
        used = {}
        for handle in self._handles:
            uuid, _ = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            memory, _ = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
            if uuid is not None and memory is not None:
                used[uuid] = int(memory.used)
        return used

    def find(self, uuid: str) -> Gpu | None:
        """The device, or slice of one (MIG), of this UUID, with or without its prefix."""
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for candidate in (f"GPU-{bare}", f"MIG-{bare}"):
            handle, _ = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, candidate)
            if handle is not None:
                return Gpu(self._nvml, handle, candidate)
        return None

    def of_device(self, device: str) -> Gpu | None:
        """The device that ``cuda:1`` means to a program: among those it may see, in the order of the PCI bus."""
        number = int(device.partition(":")[2] or 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            names = [name.strip() for name in visible.split(",")]
            if number >= len(names):
                return None
            if not names[number].isdecimal():
                return self.find(names[number])
            number = int(names[number])
        if number >= len(self._handles):
            return None
        uuid, _ = self._ask(self._nvml.nvmlDeviceGetUUID, self._handles[number])
        return None if uuid is None else self.find(uuid)


class Gpu:
    """One device."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self.uuid = uuid

    def read(self, pids: Collection[int]) -> GpuReading:
        """What these processes hold on the device together, what is used in all, and the energy counter."""
        nvml = self._nvml
        processes, _ = _ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        shown = [int(p.usedGpuMemory) for p in processes or () if p.pid in pids and p.usedGpuMemory is not None]
        energy, _ = _ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)
        memory, refusal = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, self._handle)
        return GpuReading(
            sum(shown) if shown else None,
            None if memory is None else int(memory.used),
            None if energy is None else int(energy),
            refusal,
        )


def _ask(nvml: Any, question: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """The driver's answer, or ``None`` and what it said instead."""
    try:
        return question(*arguments), None
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"


def gpus() -> tuple[Gpus | None, str | None]:
    """The GPUs, or the reason why none can be seen."""
    import pynvml

    try:
        return Gpus(pynvml), None
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
