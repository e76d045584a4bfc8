"""The environment that figures depend on: machine, versions, threads; and the memory that is available."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from membench.host import nvml
from membench.host.git import GitFailed, git

_PACKAGES = (
    "membench",
    "torch",
    "transformers",
    "torchao",
    "numpy",
    "safetensors",
    "bitsandbytes",
    "peft",
    "accelerate",
)
WAIT_POLICY_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables by which a user chooses how OpenMP's threads wait for each other."""

_VARIABLES = (
    "OMP_NUM_THREADS",
    *WAIT_POLICY_VARIABLES,
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",  # the older name, which torch reads, too
)
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
_PACKAGE = Path(__file__).parent.parent
# They decide which kernels a language model runs: x86's flags, then ARM's features.
_INSTRUCTIONS = (
    "fma", "f16c", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_GIT_TIMEOUT_S = 5.0
_SAME_MEMORY = 0.01  # the kernel keeps a little more or less for itself at each start


def usable_cores() -> int:
    """Count the cores that this process may use, by its affinity and a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def _cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of this process's control group and those above it; ``controller`` is '' for version 2."""
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = _CGROUPS / controller / path.strip("/")
            return [folder for folder in (own, *own.parents) if folder.is_relative_to(_CGROUPS / controller)]
    return []


def _left_in_cgroups() -> list[int]:
    """Return the bytes left under each memory limit of a container or a service manager.

    The page cache counts as used there, but the kernel drops it before it refuses memory, so it is added.
    """
    left = []
    for controller, limit_name, used_name, prefix in (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for folder in _cgroup_folders(controller):
            try:
                limit, used = (folder / limit_name).read_text(), (folder / used_name).read_text()
                counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cache = sum(int(counters.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                left.append(max(0, int(limit) - int(used) + cache))
            except (OSError, ValueError):  # no limit is written 'max', and the topmost group has no such file
                continue
    return left


def available_bytes() -> int:
    """Return how much memory can still be taken: of the machine, or of a container if that is less."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def worker_environment(threads: int | None) -> dict[str, str]:
    """Return the environment of a worker, in which threads wait for each other as the user's own would.

    Args:
        threads: ``None`` for a script, which gets the user's own environment.
    """
    environment = dict(os.environ)
    if threads is None:
        return environment
    environment["OMP_NUM_THREADS"] = str(threads)
    # Else importing numpy starts threads before the fork; the worker sets what ``numpy_threads`` says.
    environment["OPENBLAS_NUM_THREADS"] = "1"
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for CUDA must not touch it before the fork
    environment["PYTHONHASHSEED"] = "0"
    return environment


def numpy_threads(threads: int | None) -> int | None:
    """Return the number of threads of numpy's products in a user's process: what its environment says, or all.

    Args:
        threads: the number of threads of a worker.
    """
    own = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(own) if own.isdecimal() and int(own) else threads


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of membench's own checkout; ``None`` if it is installed elsewhere."""
    root = _PACKAGE.parent
    try:
        if tomllib.loads((root / "pyproject.toml").read_text())["project"]["name"] != "membench":
            return None
    except (OSError, ValueError, KeyError):
        return None
    try:
        if Path(git(root, "rev-parse", "--show-toplevel", timeout_s=_GIT_TIMEOUT_S)).resolve() != root.resolve():
            return None
        described = git(root, "--no-optional-locks", "describe", "--always", "--dirty", timeout_s=_GIT_TIMEOUT_S)
        return described or None
    except GitFailed:
        return None


def _cpu_info() -> dict[str, str]:
    """Read what the kernel reports about the first core."""
    try:
        first = _CPU_INFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def processor_flags() -> str:
    """Return all instruction sets of the processor as the kernel lists them, which native code is compiled for."""
    info = _cpu_info()
    return info.get("flags", info.get("Features", ""))


def _cpu() -> dict[str, Any]:
    """Return what distinguishes processors of one name: generation, and instructions that decide between kernels."""
    info = _cpu_info()
    known = set(processor_flags().split())
    return {
        "vendor": info.get("vendor_id", info.get("CPU implementer")),
        "family": info.get("cpu family", info.get("CPU architecture")),
        "model": info.get("model", info.get("CPU part")),
        "stepping": info.get("stepping", info.get("CPU revision")),
        "instructions": [name for name in _INSTRUCTIONS if name in known] if known else None,
    }


def _gpus() -> list[dict[str, Any]] | str | None:
    found, reason = nvml.gpus()
    return found.describe() if found else reason


def describe(threads: int | None, *, with_gpus: bool = False) -> dict[str, Any]:
    """Describe this machine, as every record does.

    Args:
        threads: ``None`` for a script, which chooses by itself.
        with_gpus: whether a case runs on a GPU: ``gpus`` then lists them, or is the reason why none can be seen.
    """
    environment = worker_environment(threads)
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "processor": _cpu_info().get("model name"),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "packages": {package: installed_version(package) for package in _PACKAGES},
        "commit": _commit(),
        "threads": threads,
        "variables": {name: environment.get(name) for name in _VARIABLES},
        "gpus": _gpus() if with_gpus else None,
    }


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List the differences between two machines whose figures must not be mixed in a run: 'cores: 2, now 4'.

    What one description lacks (GPUs, if no case ran on one) is not a difference.
    """
    return [f"{name}: {before}, now {now}" for name, before, now in unlike(first, second)]


def unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the differences as (name, first value, second value); names are such as 'packages.torch', 'gpus.0.name'."""
    before, now = _respects(first), _respects(second)
    found = []
    for name in sorted(before.keys() & now.keys()):
        is_size = name == "memory_bytes" or name.endswith(".memory_bytes")
        if before[name] != now[name] and not (is_size and _nearly(before[name], now[name])):
            found.append((name, before[name], now[name]))
    return found


def _respects(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the parts of a description that figures depend on, by a readable name."""
    flat = {name: machine[name] for name in ("architecture", "page_bytes", "processor", "cores", "memory_bytes",
                                                 "python", "threads") if name in machine}  # fmt: skip
    for table in ("cpu", "packages", "variables"):
        entries = machine.get(table)
        flat |= {f"{table}.{name}": value for name, value in entries.items()} if isinstance(entries, Mapping) else {}
    gpus = machine.get("gpus")
    if isinstance(gpus, list):
        # Two cards of one kind count as the same: UUIDs are left out.
        flat["gpus"] = len(gpus)
        flat |= {f"gpus.{number}.{name}": gpu[name] for number, gpu in enumerate(gpus) if isinstance(gpu, Mapping)
                 for name in ("name", "memory_bytes", "driver") if name in gpu}  # fmt: skip
    elif gpus is not None:
        flat["gpus"] = gpus
    return flat


def _nearly(first: int | None, second: int | None) -> bool:
    return (
        isinstance(first, int) and isinstance(second, int) and abs(first - second) <= _SAME_MEMORY * max(first, second)
    )
