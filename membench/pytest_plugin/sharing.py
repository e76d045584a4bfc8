"""State shared by the processes of a pytest run, and the coordination of their measurements."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from membench.host import scratch
from membench.host.device import Device

FUNCTIONS = "pytest"
"""The suite name in the run file of measured functions."""

_OUTPUT = "results"


@dataclass(frozen=True)
class Sharing:
    """The state shared by all processes of a pytest run.

    Attributes:
        folder: the folder for locks and shared results, created on first use.
        output: the folder of the run files and of baselines.
        started: the start of the pytest run, which is part of the names of its run files.
        finds_suites: whether directories are searched for suites, which requires that the user names one: a plain
            ``pytest`` must not start hours of measurements.
        worker: the number of this worker of xdist; ``None`` without xdist.
        workers: the number of workers.
    """

    folder: Path
    output: Path
    started: datetime
    finds_suites: bool
    worker: int | None = None
    workers: int = 1

    @classmethod
    def of(cls, config: pytest.Config) -> Sharing:
        """Return the shared state of a pytest run, created on first use."""
        known = config.stash.get(_SHARING, None)
        if known is None:
            received = getattr(config, "workerinput", None)
            known = config.stash[_SHARING] = cls._new(config) if received is None else cls._from_worker_input(received)
        return known

    @classmethod
    def _new(cls, config: pytest.Config) -> Sharing:
        # The name lets the next run remove the folder of a run that was killed.
        folder = Path(tempfile.gettempdir()) / f"membench-{os.getpid()}-pytest_{uuid.uuid4().hex}"
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        finds_suites = config.args_source is not pytest.Config.ArgsSource.INVOCATION_DIR
        output = config.invocation_params.dir / (config.getoption("membench_output") or _OUTPUT)
        return cls(folder, output, datetime.now(UTC), finds_suites)

    @classmethod
    def _from_worker_input(cls, received: dict[str, Any]) -> Sharing:
        own = received["membench"]
        return cls(
            Path(own["folder"]),
            Path(own["output"]),
            datetime.fromisoformat(own["started"]),
            own["finds_suites"],
            int(received["workerid"].removeprefix("gw")),
            received["workercount"],
        )

    def worker_input(self) -> dict[str, Any]:
        """Return the state for a worker of xdist, as types that can be sent."""
        return {
            "folder": str(self.folder),
            "output": str(self.output),
            "started": self.started.isoformat(),
            "finds_suites": self.finds_suites,
        }

    def _file(self, name: str) -> Path:
        _share(self.folder)
        return self.folder / name

    @property
    def references(self) -> Path:
        """The folder for the logits of references, which no later run uses."""
        return self.folder / "references"

    def new_file(self, name: str) -> Path:
        """Return the path of a new file, for data passed to a measured process."""
        return self._file(f"{name}-{uuid.uuid4().hex}")

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """Return a lock that excludes all other processes of the pytest run."""
        import filelock

        return filelock.FileLock(self._file(f"{_digest(name)}.lock"))

    def once(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], bool]:
        """Return the shared result for a name, and whether this call made it; only the first process calls ``make``."""
        with self.lock(name):
            kept = self._file(f"{_digest(name)}.json")
            if kept.exists():
                found: list[dict[str, Any]] = json.loads(kept.read_text())
                return found, False
            made = make()
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(made))
            partial.replace(kept)
            return made, True

    def turn(self) -> Turns | None:
        """Return the coordination with other workers of xdist; ``None`` without xdist."""
        return None if self.worker is None else _turns(self._file("door"), self._file("floor"))

    def gpu(self, devices: Sequence[str]) -> Gpu:
        """Return the GPU assigned to this worker, if the devices do not name one (``cuda`` without an index)."""
        named = [device for device in map(Device.parse, devices) if device.on_gpu]
        if self.worker is None or not named or any(device.index is not None or device.count > 1 for device in named):
            return Gpu({}, nullcontext())
        return self.gpu_among(_visible_gpus())

    def gpu_among(self, gpus: Sequence[str]) -> Gpu:
        """Return the GPU assigned to this worker among ``gpus``; workers with the same GPU exclude each other."""
        if self.worker is None or not gpus:
            return Gpu({}, nullcontext())
        own = gpus[self.worker % len(gpus)]
        shared = self.workers > len(gpus)
        return Gpu({"CUDA_VISIBLE_DEVICES": own}, self.lock(f"gpu {own}") if shared else nullcontext())


_SHARING = pytest.StashKey[Sharing]()


@dataclass(frozen=True)
class Gpu:
    """The environment variables that select a GPU for measured processes, and the lock to hold while one runs."""

    variables: dict[str, str]
    held: AbstractContextManager[Any]


class Turns:
    """A ``membench.running.running_job.Turn`` among processes, by two file locks that the kernel releases at exit.

    A process takes the lock ``door`` to acquire ``floor``. One that waits to run exclusively keeps ``door`` meanwhile;
    otherwise new shared holders of ``floor`` could make it wait forever.
    """

    def __init__(self, door: Path, floor: Path) -> None:
        self._door = os.open(door, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._floor = os.open(floor, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._shares = False

    def share(self) -> None:
        if not self._shares:
            self._enter(fcntl.LOCK_SH)
            self._shares = True

    def alone(self) -> None:
        self._enter(fcntl.LOCK_EX)

    def _enter(self, how: int) -> None:
        self.leave()
        fcntl.flock(self._door, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._floor, how)
        finally:
            fcntl.flock(self._door, fcntl.LOCK_UN)

    def leave(self) -> None:
        fcntl.flock(self._floor, fcntl.LOCK_UN)
        self._shares = False


# Cached: a process must lock the shared folder only once.
_share = functools.cache(scratch.share)

# Cached: all runners of a process share one turn.
_turns = functools.cache(Turns)


def suite_baseline_name(name: str, suite: str) -> str:
    """Return the name of a suite's baseline if a pytest run of several suites is saved under one name."""
    return f"{name}-{suite}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _visible_gpus() -> list[str]:
    """Return the GPUs in ``CUDA_VISIBLE_DEVICES``, else the UUIDs of all GPUs."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    from membench.host.nvml import gpus

    found, _ = gpus()
    return [gpu["uuid"] for gpu in found.describe() if gpu["uuid"]] if found else []
