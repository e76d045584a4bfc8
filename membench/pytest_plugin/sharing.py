"""What the processes of one pytest run agree on, and how those of them that measure keep out of each other's way."""

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
"""What stands for the suite's name in the file of what functions of tests took."""

_OUTPUT = "results"


@dataclass(frozen=True)
class Sharing:
    """What a process of a pytest run knows of the others.

    Attributes:
        folder: for locks and results that are shared; it is made once it is needed.
        output: the folder of the runs' files.
        started: when the pytest run began: a part of the names of its runs' files.
        finds_suites: whether directories are searched for suites: only where the user named one. Whoever types nothing
            but ``pytest`` wants tests, and not hours of measuring.
        worker: the number of a worker of xdist; ``None`` where there are none.
        workers: how many there are.
    """

    folder: Path
    output: Path
    started: datetime
    finds_suites: bool
    worker: int | None = None
    workers: int = 1

    @classmethod
    def of(cls, config: pytest.Config) -> Sharing:
        """What a process knows, from the beginning of its pytest run on."""
        known = config.stash.get(_SHARING, None)
        if known is None:
            told = getattr(config, "workerinput", None)
            known = config.stash[_SHARING] = cls._begun(config) if told is None else cls._heard(told)
        return known

    @classmethod
    def _begun(cls, config: pytest.Config) -> Sharing:
        # Named so that what is left of a run that was killed is swept away by the next.
        folder = Path(tempfile.gettempdir()) / f"membench-{os.getpid()}-pytest_{uuid.uuid4().hex}"
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        finds_suites = config.args_source is not pytest.Config.ArgsSource.INVOCATION_DIR
        return cls(folder, config.invocation_params.dir / _OUTPUT, datetime.now(UTC), finds_suites)

    @classmethod
    def _heard(cls, told: dict[str, Any]) -> Sharing:
        own = told["membench"]
        return cls(
            Path(own["folder"]),
            Path(own["output"]),
            datetime.fromisoformat(own["started"]),
            own["finds_suites"],
            int(told["workerid"].removeprefix("gw")),
            told["workercount"],
        )

    def told(self) -> dict[str, Any]:
        """For a worker of xdist, of types that can be sent."""
        return {
            "folder": str(self.folder),
            "output": str(self.output),
            "started": self.started.isoformat(),
            "finds_suites": self.finds_suites,
        }

    def _file(self, name: str) -> Path:
        _share(self.folder)
        return self.folder / name

    def passing(self, name: str) -> Path:
        """A file for something that is passed to a measured process."""
        return self._file(f"{name}-{uuid.uuid4().hex}")

    def lock(self, name: str) -> AbstractContextManager[Any]:
        """Held by one process of the pytest run at a time."""
        import filelock

        return filelock.FileLock(self._file(f"{_digest(name)}.lock"))

    def once(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], bool]:
        """What the first process that asks for a name makes; and whether this one has made it just now."""
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
        """By which workers of xdist take turns; ``None`` where there are no others."""
        return None if self.worker is None else _turns(self._file("door"), self._file("floor"))

    def gpu(self, devices: Sequence[str]) -> Gpu:
        """The GPU of this worker, if there are several and the devices leave it open which (``cuda``)."""
        named = [device for device in map(Device.parse, devices) if device.on_gpu]
        if self.worker is None or not named or any(device.index is not None for device in named):
            return Gpu({}, nullcontext())
        return self.gpu_among(_visible_gpus())

    def gpu_among(self, gpus: Sequence[str]) -> Gpu:
        """The GPU of this worker out of those that there are; workers that have the same one take turns."""
        if self.worker is None or not gpus:
            return Gpu({}, nullcontext())
        own = gpus[self.worker % len(gpus)]
        shared = self.workers > len(gpus)
        return Gpu({"CUDA_VISIBLE_DEVICES": own}, self.lock(f"gpu {own}") if shared else nullcontext())


_SHARING = pytest.StashKey[Sharing]()


@dataclass(frozen=True)
class Gpu:
    """Which GPU measured processes see, as environment variables, and what to hold while one of them has it."""

    variables: dict[str, str]
    held: AbstractContextManager[Any]


class Turns:
    """``membench.running.runner.Turn`` among processes, by two locks that the kernel gives back when their holder dies.

    Those who share the floor come in by the door. Who wants to be alone holds the door until the others have left the
    floor, so that no new ones keep it waiting for ever.
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


# A process holds the folder once.
_share = functools.cache(scratch.share)

# A process has one place in the queue, whichever of its runners is at work.
_turns = functools.cache(Turns)


def own_name(name: str, suite: str) -> str:
    """What a suite's baseline is called where a pytest run of several is saved under one name."""
    return f"{name}-{suite}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _visible_gpus() -> list[str]:
    """As CUDA is told of them: those that the user left visible, else all, by UUID."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    from membench.host.nvml import gpus

    found, _ = gpus()
    return [gpu["uuid"] for gpu in found.describe() if gpu["uuid"]] if found else []
