"""Readings of GPUs through NVML, from outside the measured process. No torch.

NVML numbers devices by PCI bus; CUDA may use another order or see only some. A device is therefore found by its UUID,
which the worker reports once it has a CUDA context.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from membench.host.device import Device


@dataclass(frozen=True)
class GpuReading:
    """One reading of a device.

    ``process_bytes`` is ``None`` if the driver does not show the processes (containers often hide them), ``used_bytes``
    if it refuses to report it, and ``energy_mj``, counted since the driver was loaded, if the device has no counter.
    ``refusal`` is the driver's message if it did not report the used memory.
    """

    process_bytes: int | None
    used_bytes: int | None
    energy_mj: int | None
    refusal: str | None = None


class Gpus:
    """The machine's NVIDIA GPUs. ``nvml`` is the module ``pynvml``.

    A driver may refuse any single query (a lost device, a virtual GPU, missing rights): its result is then ``None``.

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
        """Return name, UUID, memory and driver of each device, in the order of the PCI bus.

        ``refused`` has the driver's message for each of these that it did not report.
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
        """Return used memory by UUID, of devices that report it. Before a worker starts this is the idle level."""
        used = {}
        for handle in self._handles:
            uuid, _ = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            memory, _ = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
            if uuid is not None and memory is not None:
                used[uuid] = int(memory.used)
        return used

    def find(self, uuid: str) -> Gpu | None:
        """Find a device, or a slice of one (MIG), by its UUID, with or without prefix."""
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for candidate in (f"GPU-{bare}", f"MIG-{bare}"):
            handle, _ = self._ask(self._nvml.nvmlDeviceGetHandleByUUID, candidate)
            if handle is not None:
                return Gpu(self._nvml, handle, candidate)
        return None

    def of_device(self, device: str) -> Gpu | None:
        """Find the device that ``cuda:1`` means to a program: among those it may see, in the order of the PCI bus."""
        number = Device.parse(device).index or 0
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
        """Read the memory that these processes hold together, the used memory in all, and the energy counter."""
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
    """Return the driver's answer, or ``None`` and its message."""
    try:
        return question(*arguments), None
    except nvml.NVMLError as error:
        return None, f"NVML: {error}"


def gpus() -> tuple[Gpus | None, str | None]:
    """Return the GPUs, or the reason why none can be seen."""
    import pynvml

    try:
        return Gpus(pynvml), None
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
