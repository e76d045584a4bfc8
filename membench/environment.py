"""What a figure depends on: machine, versions, commit, threads; and how much memory is left."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("membench", "torch", "transformers", "torchao", "numpy")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control group and those above it; ``controller`` is '' for version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = _CGROUPS / controller / path.strip("/")
            return [folder for folder in (own, *own.parents) if folder.is_relative_to(_CGROUPS / controller)]
    return []


def _left_in_cgroups() -> list[int]:
    """Bytes left under each memory limit that a container or a service manager has set.

    The page cache counts as used there, but the kernel drops it before it refuses memory: it is left, too.
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
    """Memory that can still be taken: the machine's, or a container's where that is less."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def worker_environment(threads: int) -> dict[str, str]:
    """The environment a worker starts in. Passive waiting keeps OpenMP from spinning against other work."""
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["OPENBLAS_NUM_THREADS"] = "1"  # else importing numpy starts threads before the fork
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for CUDA must not touch it before the fork
    environment["PYTHONHASHSEED"] = "0"
    if "GOMP_SPINCOUNT" not in environment:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        shown = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return None
    return None


def describe(threads: int) -> dict[str, Any]:
    """The machine's description that stands in every record."""
    environment = worker_environment(threads)
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "threads": threads,
        "variables": {name: environment.get(name) for name in _VARIABLES},
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """In which respects two descriptions are of machines whose figures must not stand in one run."""
    keys = ("processor", "cores", "memory_bytes", "python", "packages", "threads")
    return [key for key in keys if first.get(key) != second.get(key)]
