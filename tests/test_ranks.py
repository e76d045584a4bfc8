"""A job on several ranks: phases begin together, the ranks end together, and all that they read is kept."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment
from membench.host.device import Device
from membench.protocol import pickling
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import FunctionJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.suite.schema import Settings

_MIB = 2**20
_DEVICE = Device.parse("2xcpu")


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[LocalExecutor]:
    with LocalExecutor(Needs((_DEVICE,), 1, tmp_path, ("membench.worker.main",)), silent) as executor:
        yield executor


def _job(folder: Path, function: Callable[[], Any], **settings: Any) -> FunctionJob:
    given = pickling.as_bytes((function, (), {}), by_value=[sys.modules[__name__]])
    here = {"path": sys.path, "folder": str(folder), "environment": environment.worker_environment(1), "call": given}
    (folder / "call").write_bytes(pickle.dumps(here))
    return FunctionJob(
        id="f", repeat=0, device=_DEVICE, model="file", workload="test", pickled=folder / "call",
        raised=folder / "raised", settings=Settings.model_validate({"measured_steps": 2, **settings}),
    )  # fmt: skip


def test_each_rank_is_read_by_itself_and_phases_begin_together(executor: LocalExecutor, tmp_path: Path) -> None:
    def hold() -> bytearray:
        # Each rank makes a folder of its name: the second is slower by half a second.
        is_second = not _made(tmp_path / "first")
        time.sleep(0.5 if is_second else 0.0)
        return bytearray(32 * _MIB)

    record = executor.measure(_job(tmp_path, hold))
    assert (record.status, record.message) == ("ok", None)
    assert [(process.rank, process.device) for process in record.processes] == [(0, "cpu"), (1, "cpu")]
    assert len({process.pid for process in record.processes}) == 2
    for process in record.processes:
        run = process.phase("run")
        assert run is not None
        assert run.peak_live_bytes == pytest.approx(32 * _MIB, abs=_MIB)
    first, second = (process.phase("run") for process in record.processes)
    assert first is not None
    assert second is not None
    assert first.began_s == pytest.approx(second.began_s, abs=0.2)
    # What both hold at one moment is in the timeline of the job.
    assert max(record.timeline["anonymous_bytes"]) > max(
        process.baseline.anonymous_bytes for process in record.processes if process.baseline
    )


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def test_if_one_rank_dies_the_others_are_ended_and_it_is_named(executor: LocalExecutor, tmp_path: Path) -> None:
    def die() -> None:
        if _made(tmp_path / "dead"):
            os.abort()
        time.sleep(600)

    began = time.monotonic()
    record = executor.measure(_job(tmp_path, die))
    assert time.monotonic() - began < 60
    assert record.status == "crashed"
    assert record.message in ("rank 0: killed by SIGABRT", "rank 1: killed by SIGABRT")
    assert len(record.processes) == 2
    # Nothing of them is left, and the next job begins as if nothing had happened.
    assert executor.measure(_job(tmp_path, int)).status == "ok"


def test_ranks_that_take_too_long_are_ended_together(executor: LocalExecutor, tmp_path: Path) -> None:
    record = executor.measure(_job(tmp_path, lambda: time.sleep(600), timeout_s=2))
    assert record.status == "timeout"
    assert record.message in ("rank 0: not done after 2 s", "rank 1: not done after 2 s")
