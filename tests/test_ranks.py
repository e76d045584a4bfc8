"""Jobs on several ranks: common phase boundaries, common end, and readings of every rank in the record."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment
from membench.host.device import Device
from membench.protocol import pickling
from membench.protocol.case import Case, Plugin
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import FunctionJob
from membench.running.jobs.script import ScriptJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.running.timeline import Sample, Timeline
from membench.suite.schema import Settings

_MIB = 2**20
_DEVICE = Device.parse("2xcpu")


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[LocalExecutor]:
    with LocalExecutor(Needs((_DEVICE,), 1, tmp_path, ("membench.worker.main",)), silent) as executor:
        yield executor


def _job(folder: Path, function: Callable[[], Any], **settings: Any) -> FunctionJob:
    call = pickling.as_bytes((function, (), {}), by_value=[sys.modules[__name__]])
    sent = pickling.FunctionCall(tuple(sys.path), str(folder), environment.worker_environment(1), call)
    (folder / "call").write_bytes(pickle.dumps(sent))
    return FunctionJob(
        id="f", repeat=0, device=_DEVICE, model="file", workload="test", pickled=folder / "call",
        raised=folder / "raised", settings=Settings.model_validate({"measured_steps": 2, **settings}),
    )  # fmt: skip


def test_each_rank_has_its_own_readings_and_phases_begin_together(executor: LocalExecutor, tmp_path: Path) -> None:
    def allocate() -> bytearray:
        # The rank that does not create the folder is slower by half a second.
        is_second = not _create(tmp_path / "first")
        time.sleep(0.5 if is_second else 0.0)
        return bytearray(32 * _MIB)

    record = executor.measure(_job(tmp_path, allocate))
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
    # The timeline of the job contains the sum over both ranks.
    assert max(record.timeline["anonymous_bytes"]) > max(
        process.baseline.anonymous_bytes for process in record.processes if process.baseline
    )


def _create(folder: Path) -> bool:
    """Create a folder; return whether it did not exist."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def test_a_crash_of_one_rank_kills_the_others_and_the_message_names_it(executor: LocalExecutor, tmp_path: Path) -> None:
    def crash() -> None:
        if _create(tmp_path / "crashed"):
            os.abort()
        time.sleep(600)

    started_s = time.monotonic()
    record = executor.measure(_job(tmp_path, crash))
    assert time.monotonic() - started_s < 60
    assert record.status == "crashed"
    assert record.message in ("rank 0: killed by SIGABRT", "rank 1: killed by SIGABRT")
    assert len(record.processes) == 2
    # No process is left, and the next job is not affected.
    assert executor.measure(_job(tmp_path, int)).status == "ok"


def test_a_timeout_kills_all_ranks_and_names_the_one_that_the_others_wait_for(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    def hang_on_one() -> None:
        if _create(tmp_path / "first"):
            (tmp_path / "first" / str(os.getpid())).touch()
        if not (tmp_path / "first" / str(os.getpid())).exists():
            time.sleep(600)

    record = executor.measure(_job(tmp_path, hang_on_one, timeout_s=5))
    assert record.status == "timeout"
    hanging = next(process for process in record.processes if not (tmp_path / "first" / str(process.pid)).exists())
    message = re.sub(r"line \d+", "line N", record.message or "")
    assert message == f"rank {hanging.rank}: not done after 5 s; it was in hang_on_one (test_ranks.py, line N)"
    assert not [process.pid for process in record.processes if Path(f"/proc/{process.pid}").exists()]


def test_scripts_on_two_ranks_may_end_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, time\ntry:\n    os.mkdir('first')\nexcept FileExistsError:\n    time.sleep(0.5)\n"
    )
    command = (sys.executable, "own.py")
    case = Case(
        "own", "none", "script", "2xcpu", Plugin("script"), (Plugin("none"),), Plugin("script"), command=command
    )
    job = ScriptJob(id=case.id, repeat=0, device=_DEVICE, settings=Settings.model_validate({}), case=case)
    with contextlib.chdir(tmp_path), LocalExecutor(Needs.of([job], tmp_path), silent) as executor:
        record = executor.measure(job)
    assert (record.status, record.message, record.remarks) == ("ok", None, ())
    assert [process.exit_code for process in record.processes] == [0, 0]
    first, second = sorted(process.phases[0].duration_s for process in record.processes)
    assert second - first > 0.3


def test_a_timeline_sums_what_the_ranks_hold_until_each_of_them_ends() -> None:
    def sample(at_s: float, mib: int) -> Sample:
        return Sample(at_s, mib * _MIB, mib * _MIB, 0, None, None)

    kept = Timeline()
    for rank, at_s, mib in ((0, 0.0, 10), (1, 0.1, 5), (0, 0.2, 12), (1, 0.3, 6)):
        kept.add(rank, sample(at_s, mib))
    kept.end(0)
    kept.add(1, sample(0.4, 7))
    columns = kept.columns()
    assert columns["at_s"] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert columns["rss_bytes"] == [mib * _MIB for mib in (10, 15, 17, 18, 7)]
