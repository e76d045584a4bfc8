"""GPUs through NVML at its documented interface, with a module that stands in for a driver."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from membench.host.device import Device
from membench.host.nvml import Gpus
from membench.protocol.case import Case
from membench.protocol.messages import Result
from membench.protocol.readings import PhaseReading, ProcessReading
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.jobs.script import ScriptJob
from membench.running.marked_phases import MarkedPhases
from membench.running.observer import Observer
from membench.running.timeline import Timeline
from membench.suite.schema import Settings
from tests import made_up

MIB = 2**20


@dataclass
class _Memory:
    total: int
    used: int


@dataclass
class _Process:
    pid: int
    usedGpuMemory: int | None


class NVMLError(Exception):
    pass


@dataclass
class FakeNvml:
    """Two devices in the order of the PCI bus; ``processes``, ``used`` and ``energy_mj`` are theirs by UUID.

    It refuses the calls named in ``refused``.
    """

    processes: dict[str, list[_Process]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=lambda: {"GPU-aa": 500 * MIB, "GPU-bb": 300 * MIB})
    energy_mj: int | None = 1000
    refused: tuple[str, ...] = ()
    NVMLError: type[Exception] = NVMLError

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.refused:

            def refuse(*_: object) -> None:
                raise NVMLError("Insufficient Permissions")

            return refuse
        return super().__getattribute__(name)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("GPU-aa", "GPU-bb")[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.used:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "Accelerator"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> _Memory:
        return _Memory(80 * 2**30, self.used[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[_Process]:
        return self.processes.get(handle, [])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.energy_mj is None:
            raise NVMLError("Not Supported")
        return self.energy_mj


def _observed(nvml: FakeNvml, uuid: str = "bb") -> dict[str, Any]:
    """A phase in which this process takes 1 GiB on a device and gives half of it back."""
    gpus = Gpus(nvml)
    observer = Observer(os.getpid(), gpus, gpus.used_bytes(), Timeline())
    assert observer.use_gpu(uuid) is None
    observer.begin_phase()
    shown = nvml.processes.get("GPU-bb", [])
    for now in (1024 * MIB, 512 * MIB):
        nvml.used["GPU-bb"] = 300 * MIB + now
        for process in shown:
            if process.usedGpuMemory is not None:
                process.usedGpuMemory = now
        observer.sample()
    if nvml.energy_mj is not None:
        nvml.energy_mj += 2500
    return vars(observer.end_phase())


def test_a_device_is_found_by_uuid_and_not_by_its_place_on_the_bus() -> None:
    seen = _observed(FakeNvml({"GPU-bb": [_Process(os.getpid(), 0), _Process(1, 7 * MIB)]}))
    assert seen["gpu_process_peak_bytes"] == 1024 * MIB
    assert seen["gpu_process_end_bytes"] == 512 * MIB
    assert seen["gpu_energy_j"] == 2.5


def test_use_above_the_idle_level_stands_in_for_hidden_processes() -> None:
    for processes in ([], [_Process(os.getpid(), None)]):
        seen = _observed(FakeNvml({"GPU-bb": list(processes)}))
        assert seen["gpu_process_peak_bytes"] is None
        assert seen["gpu_used_peak_bytes"] == 1024 * MIB


def test_a_device_without_an_energy_counter_has_no_energy() -> None:
    assert _observed(FakeNvml(energy_mj=None))["gpu_energy_j"] is None


_QUESTIONS = sorted(name for name in vars(FakeNvml) if name.startswith("nvml"))


@pytest.mark.parametrize("refused", [*((name,) for name in _QUESTIONS), tuple(_QUESTIONS[1:])], ids=str)
def test_whatever_a_driver_refuses_nothing_is_thrown_and_the_rest_is_told(refused: tuple[str, ...]) -> None:
    nvml = FakeNvml({"GPU-bb": [_Process(os.getpid(), 0)]})
    whole = Gpus(nvml).describe()
    nvml.refused = refused
    try:
        gpus = Gpus(nvml)
    except NVMLError:
        assert set(refused) & {"nvmlInit", "nvmlDeviceGetCount"}  # without these there is no driver
        return
    if "nvmlDeviceGetHandleByIndex" in refused:
        assert gpus.describe() == []
        return
    keys = {"nvmlDeviceGetName": "name", "nvmlDeviceGetUUID": "uuid", "nvmlDeviceGetMemoryInfo": "memory_bytes",
            "nvmlSystemGetDriverVersion": "driver"}  # fmt: skip
    untold = {keys[name] for name in refused if name in keys}
    for device, known in zip(gpus.describe(), whole, strict=True):
        assert device.pop("refused", {}) == dict.fromkeys(untold, "NVML: Insufficient Permissions")
        assert device == {key: None if key in untold else value for key, value in known.items()}
    assert bool(gpus.used_bytes()) == (not untold & {"uuid", "memory_bytes"})
    found = gpus.find("bb")
    assert (found is None) == ("nvmlDeviceGetHandleByUUID" in refused)
    if found is not None:
        reading = found.read({os.getpid()})
        assert (reading.process_bytes is None) == ("nvmlDeviceGetComputeRunningProcesses" in refused)
        assert (reading.used_bytes is None) == ("nvmlDeviceGetMemoryInfo" in refused)
        assert (reading.energy_mj is None) == ("nvmlDeviceGetTotalEnergyConsumption" in refused)


def test_a_device_that_refuses_its_memory_is_observed_without_and_says_so() -> None:
    seen = _observed(FakeNvml(refused=("nvmlDeviceGetMemoryInfo",)))
    assert (seen["gpu_process_peak_bytes"], seen["gpu_used_peak_bytes"], seen["gpu_used_end_bytes"]) == (None,) * 3
    assert seen["gpu_energy_j"] == 2.5
    found = _gpu_case(**{key: value for key, value in seen.items() if key.startswith("gpu_")})
    for name in ("peak_footprint_bytes", "held_footprint_bytes", "context_overhead_bytes"):
        assert (found.metrics[name], found.reasons[name]) == (None, "NVML: Insufficient Permissions")
    assert found.metrics["energy_j"] == 2.5 / 5


def test_a_device_that_refuses_its_memory_only_once_keeps_what_was_seen() -> None:
    nvml = FakeNvml()
    gpus = Gpus(nvml)
    observer = Observer(os.getpid(), gpus, gpus.used_bytes(), Timeline())
    assert observer.use_gpu("bb") is None
    observer.begin_phase()
    nvml.used["GPU-bb"] += 7 * MIB
    observer.sample()
    nvml.refused = ("nvmlDeviceGetMemoryInfo",)
    seen = vars(observer.end_phase())
    assert (seen["gpu_used_peak_bytes"], seen["gpu_used_end_bytes"]) == (7 * MIB, None)
    found = _gpu_case(**{key: value for key, value in seen.items() if key.startswith("gpu_")})
    assert found.metrics["peak_footprint_bytes"] == 7 * MIB
    for name in ("held_footprint_bytes", "context_overhead_bytes"):
        assert (found.metrics[name], found.reasons[name]) == (None, "NVML: Insufficient Permissions")


def test_an_unknown_device_is_named() -> None:
    gpus = Gpus(FakeNvml())
    assert Observer(os.getpid(), gpus, {}, Timeline()).use_gpu("cc") == "NVML knows no device with the UUID cc"


def _gpu_case(**seen: Any) -> DerivedMetrics:
    phase = {
        "duration_s": 1.0, "parts": {}, "steps": 5, "cuda_peak_allocated_bytes": 100 * MIB,
        "cuda_held_allocated_bytes": 80 * MIB, "cuda_peak_reserved_bytes": 128 * MIB,
        "cuda_held_reserved_bytes": 96 * MIB, "gpu_process_peak_bytes": None, "gpu_process_end_bytes": None,
        "gpu_used_peak_bytes": None, "gpu_used_end_bytes": None, "gpu_energy_j": None, "gpu_unknown": None,
    } | seen  # fmt: skip
    phases = [{"name": name, **phase} for name in ("load", "apply", "warmup", "run", "time")]
    result = {"weights_bytes": 1, "pinned": True, "disk_bytes": 1, "disk_format": "safetensors",
              "durations_s": [1.0, 1.0], "tokens_per_step": 4, "decoded_tokens": None, "is_trained": False,
              "losses_nats": [], "quality": {"nats": [1.0], "tokens": [1], "bytes": [None]}}  # fmt: skip
    return made_up.case_figures(phases, result, "cuda")


def test_live_memory_on_a_gpu_is_what_torch_allocated() -> None:
    found = _gpu_case()
    assert found.metrics["peak_live_bytes"] == 100 * MIB
    assert found.metrics["held_live_bytes"] == 80 * MIB
    assert found.metrics["peak_over_held_ratio"] == 1.25


def test_the_context_is_what_the_process_holds_beyond_torchs_reserve() -> None:
    found = _gpu_case(gpu_process_peak_bytes=600 * MIB, gpu_process_end_bytes=596 * MIB)
    assert found.metrics["peak_footprint_bytes"] == 600 * MIB
    assert found.metrics["context_overhead_bytes"] == 500 * MIB
    assert found.obtained["peak_footprint_bytes"]["source"] == "NVML per process, sampled"


def test_a_process_that_holds_less_than_torch_reserved_is_another_one() -> None:
    found = _gpu_case(
        gpu_process_peak_bytes=7 * MIB,
        gpu_process_end_bytes=7 * MIB,
        gpu_used_peak_bytes=640 * MIB,
        gpu_used_end_bytes=600 * MIB,
    )
    assert found.metrics["peak_footprint_bytes"] == 640 * MIB
    assert "above its idle level" in found.obtained["peak_footprint_bytes"]["source"]


def test_what_nvml_does_not_show_is_none_with_a_reason() -> None:
    found = _gpu_case(gpu_unknown="NVML: Driver Not Loaded")
    assert found.metrics["peak_footprint_bytes"] is None
    assert found.reasons["peak_footprint_bytes"] == "NVML: Driver Not Loaded"
    assert found.reasons["energy_j"] == "NVML: Driver Not Loaded"


@pytest.mark.parametrize("steps", [1, 7])
def test_energy_is_given_for_a_step(steps: int) -> None:
    found = _gpu_case(gpu_process_peak_bytes=1, gpu_used_peak_bytes=1, gpu_used_end_bytes=1, gpu_energy_j=21.0,
                      steps=steps)  # fmt: skip
    assert found.metrics["energy_j"] == 21.0 / steps


@pytest.mark.parametrize(
    ("visible", "device", "uuid"),
    [
        (None, "cuda", "GPU-aa"),
        (None, "cuda:1", "GPU-bb"),
        (None, "cuda:2", None),
        ("1", "cuda", "GPU-bb"),
        ("1", "cuda:1", None),
        ("7", "cuda", None),
        ("GPU-bb, 0", "cuda:0", "GPU-bb"),
        ("GPU-bb, 0", "cuda:1", "GPU-aa"),
        ("", "cuda", None),
    ],
)
def test_a_programs_device_is_among_those_that_it_may_see(
    visible: str | None, device: str, uuid: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = Gpus(FakeNvml()).of_device(device)
    assert (gpu.uuid if gpu else None) == uuid


def _program(nvml: FakeNvml) -> tuple[list[PhaseReading], DerivedMetrics]:
    """A program that takes 1 GiB on a device in a phase, and half of it outside."""
    gpus = Gpus(nvml)
    observer = Observer(os.getpid(), gpus, gpus.used_bytes(), Timeline())
    assert observer.use_gpu_of("cuda:1") is None
    marked = MarkedPhases(os.getpid(), observer)

    def take(mib: int) -> None:
        nvml.used["GPU-bb"] = (300 + mib) * MIB
        for process in nvml.processes.get("GPU-bb", []):
            process.usedGpuMemory = mib * MIB
        observer.sample()

    marked.enter("train")
    take(1024)
    take(512)
    marked.leave("train", None)
    phases = marked.end(time.monotonic(), 10 * MIB, 0)
    job = ScriptJob(
        id="p", repeat=0, device=Device.parse("cuda:1"), settings=Settings.model_validate({}), case=cast(Case, None)
    )
    read = ProcessReading(role="script", rank=0, device="cuda:1", phases=phases)
    return phases, job.derive(JobReadings("ok", True, 0.02, (read,), (Result(pinned=False, durations_s=[1.0]),)))


def test_what_a_program_takes_on_a_device_is_its_footprint_and_known_of_each_phase() -> None:
    phases, found = _program(FakeNvml({"GPU-bb": [_Process(os.getpid(), 0)]}))
    assert [phase.gpu_process_peak_bytes for phase in phases] == [1024 * MIB, 1024 * MIB]
    assert found.metrics["peak_footprint_bytes"] == 1024 * MIB
    assert found.obtained["peak_footprint_bytes"]["source"] == "NVML per process, sampled"
    assert found.obtained["peak_footprint_bytes"]["bound"] == "at least"


def test_where_the_driver_hides_a_program_it_is_use_above_the_idle_level() -> None:
    _, found = _program(FakeNvml())
    assert found.metrics["peak_footprint_bytes"] == 1024 * MIB
    assert "the driver hides the process" in found.obtained["peak_footprint_bytes"]["source"]
    _, refused = _program(FakeNvml(refused=("nvmlDeviceGetMemoryInfo",)))
    assert refused.reasons["peak_footprint_bytes"] == "NVML: Insufficient Permissions"
