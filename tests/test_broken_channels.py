"""Garbage on the channel of a worker ends its job with one line; the next job is measured, and memory is bounded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment, procfs
from membench.host.device import Device
from membench.protocol import pickling
from membench.protocol.case import Case, Plugin
from membench.records.record import Record
from membench.records.run_file import RunFile, read_run
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import FunctionJob
from membench.running.jobs.script import ScriptJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.suite.schema import Settings

_MIB = 2**20
_DEVICE = Device.parse("cpu")


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalExecutor]:
    folder = tmp_path_factory.mktemp("references")
    with LocalExecutor(Needs((_DEVICE,), 1, folder, ("membench.worker.main",)), silent) as executor:
        yield executor


@pytest.fixture
def measure(executor: LocalExecutor, tmp_path: Path) -> Callable[..., Record]:
    """Measures a function, and checks that a reader takes the record and that the next job is measured."""

    def measured(function: Callable[[], Any]) -> Record:
        path = tmp_path / "run.jsonl"
        with RunFile.create(path, {"run": "r", "suite": "s"}) as file:
            file.append(executor.measure(_job(tmp_path, function, 0)))
            file.append(executor.measure(_job(tmp_path, int, 1)))
        record, following = read_run(path).records
        assert following.status == "ok"
        assert record.message is not None
        assert record.message.isprintable()
        assert len(record.message) < 300
        return record

    return measured


def _pickled(folder: Path, function: Callable[[], Any]) -> bytes:
    call = pickling.as_bytes((function, (), {}), by_value=[sys.modules[__name__]])
    return pickle.dumps(pickling.FunctionCall(tuple(sys.path), str(folder), environment.worker_environment(1), call))


def _job(folder: Path, function: Callable[[], Any], repeat: int) -> FunctionJob:
    (folder / "call").write_bytes(_pickled(folder, function))
    return FunctionJob(
        id="f", repeat=repeat, device=_DEVICE, model="file", workload="test", pickled=folder / "call",
        raised=folder / "raised", settings=Settings.model_validate({"measured_steps": 2, "timeout_s": 20}),
    )  # fmt: skip


def _say(text: bytes) -> None:
    """Write to every socket that this process has inherited."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                view = memoryview(text)
                while view:
                    view = view[os.write(int(name), view) :]
                return


def _line(event: str, **fields: Any) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"


_READING = {"name": "run", "allocator": "pinned"}
_BEGIN, _END = _line("begin", phase="run"), _line("end", reading=_READING)
_END_OF_WARMUP = _line("end", reading={"name": "warmup", "allocator": "pinned"})


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        (b"\x00\xff\x1b[2J\n", "carried an invalid message"),
        (b"\n", "carried an invalid message"),
        (b'{"event": "begin", "pha\n', "carried an invalid message"),
        (b"1" * 5000 + b"\n", "carried an invalid message"),
        (b'{"event": "progress", "done": ' + b"1" * 400 + b', "total": 1, "what": ""}\n', "carried an invalid message"),
        (b"[" * 100_000 + b"\n", "carried an invalid message"),
        (_line("unheard"), "carried an invalid message"),
        (_END, "a worker ended phase 'run', which had not begun"),
        (_END_OF_WARMUP + _END_OF_WARMUP, "a worker ended phase 'warmup', which had not begun"),
        (_BEGIN, "a worker began phase 'run' within phase 'warmup'"),
        (_END_OF_WARMUP + _line("begin", phase="warmup"), "a worker began phase 'warmup' a second time"),
        (_END_OF_WARMUP + _BEGIN + _END, "a worker ended phase 'warmup', which had not begun"),
        (_line("enter", phase="x\x1b[2J"), "a worker marks no phases of its own: 'x\\x1b[2J'"),
        (_line("status", status="fine", message="m"), "a worker ended badly as 'fine', which is no such status"),
        (_line("status", status="ok", message="m"), "a worker ended badly as 'ok', which is no such status"),
        (
            _END_OF_WARMUP
            + b"".join(
                _line("begin", phase=str(number)) + _line("end", reading={**_READING, "name": str(number)})
                for number in range(200)
            ),
            "a worker began more than 100 phases",
        ),
    ],
)  # fmt: skip
def test_what_is_no_message_or_out_of_order_ends_the_job_as_failed(
    measure: Callable[..., Record], garbage: bytes, message: str
) -> None:
    record = measure(lambda: _say(garbage))
    assert record.status == "failed"
    assert message in str(record.message)


def test_an_end_without_results_is_failed(measure: Callable[..., Record]) -> None:
    def end() -> None:
        _say(_line("done"))
        os._exit(0)

    record = measure(end)
    assert (record.status, record.message) == ("failed", "a worker ended without reporting its results")


def test_results_from_which_no_figures_follow_are_failed(measure: Callable[..., Record]) -> None:
    def end() -> None:
        memory = dict.fromkeys(("peak_live_bytes", "held_live_bytes", "peak_footprint_bytes"), 0)
        reading = {"allocator": "pinned", "held_footprint_bytes": 0, **memory}
        _say(_line("end", reading={"name": "warmup", **reading}))
        for name in ("run", "time"):
            _say(_line("begin", phase=name) + _line("end", reading={"name": name, **reading}))
        _say(_line("result", result={"pinned": True, "durations_s": []}) + _line("done"))
        os._exit(0)

    record = measure(end)
    assert record.status == "failed"
    assert record.message == "no figures follow from what a worker read: StatisticsError: no median for empty data"
    assert [phase.name for phase in record.processes[0].phases] == ["warmup", "run", "time"]


def test_half_a_line_before_the_end_of_the_process_is_a_crash(measure: Callable[..., Record]) -> None:
    def end() -> None:
        _say(b'{"event": "done')
        os._exit(0)

    record = measure(end)
    assert (record.status, record.message) == ("crashed", "ended with exit code 0 before it was done")


def test_a_line_of_200_mib_without_an_end_is_refused_in_bounded_memory(measure: Callable[..., Record]) -> None:
    before = procfs.resident().peak_bytes

    def say() -> None:
        for _ in range(200):
            _say(b"x" * _MIB)

    began_s = time.monotonic()
    record = measure(say)
    assert (record.status, record.message) == (
        "failed", "a line over the worker's pipe has no end after 16.01 MiB",
    )  # fmt: skip
    assert time.monotonic() - began_s < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 64 * _MIB


def _run_out_in_a_child() -> None:
    subprocess.run([sys.executable, "-c", "raise MemoryError('no room')"], check=True)


def _abort_for_memory() -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def _raise_after_memory() -> None:
    try:
        raise MemoryError("no room")
    except MemoryError:
        traceback.print_exc()
    raise ValueError("later")


def _raise_for_memory() -> None:
    try:
        raise MemoryError("no room")
    except MemoryError as error:
        raise KeyError("weights") from error


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (_run_out_in_a_child, "out-of-memory", " exit status 1. (after: MemoryError: no room)"),
        (
            _abort_for_memory,
            "out-of-memory",
            "killed by SIGABRT: terminate called after throwing an instance of 'std::",
        ),
        (_raise_after_memory, "failed", "ValueError: later"),
        (_raise_for_memory, "out-of-memory", "KeyError: 'weights' (caused by MemoryError: no room)"),
    ],
)
def test_memory_that_runs_out_is_told_from_other_ends(
    measure: Callable[..., Record], function: Callable[[], None], status: str, message: str
) -> None:
    record = measure(function)
    assert record.status == status
    assert message in str(record.message)
    assert "no room" in record.output_tail or function is _abort_for_memory


def test_of_a_long_output_the_beginning_and_the_end_are_kept(measure: Callable[..., Record]) -> None:
    def write() -> None:
        os.write(2, b"the first words\n" + b"x" * 100_000 + b"\nthe last words\n")
        os._exit(1)

    output = measure(write).output_tail
    assert output.startswith("the first words\nxxx")
    assert output.endswith("xxx\nthe last words\n")
    assert "\n[93888 bytes are left out]\n" in output


def test_a_signal_without_a_name_is_a_crash(measure: Callable[..., Record]) -> None:
    record = measure(lambda: os.kill(os.getpid(), signal.SIGRTMIN + 3))
    assert (record.status, record.message) == ("crashed", f"killed by signal {signal.SIGRTMIN + 3}")


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        (b"no JSON\\n", "the worker's pipe carried an invalid message: no JSON"),
        (b'{\\"event\\": \\"done\\"}\\n', "a program's pipe is for marks of phases alone; it sent something else"),
    ],
)
def test_a_program_that_writes_to_its_channel_is_failed(tmp_path: Path, garbage: bytes, message: str) -> None:
    (tmp_path / "own.py").write_text(
        "import os, time\n"
        f'os.write(int(os.environ["MEMBENCH_PHASES"].partition(":")[2]), b"{garbage.decode()}")\n'
        "time.sleep(20)\n"
    )
    record = _of_program(tmp_path)
    assert (record.status, record.message) == ("failed", message)


def test_a_program_that_reads_no_answers_does_not_hold_up_the_runner(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os\n"
        'channel = int(os.environ["MEMBENCH_PHASES"].partition(":")[2])\n'
        "for _ in range(1500):\n"
        '    os.write(channel, b\'{"event": "enter", "phase": "x"}\\n{"event": "leave", "phase": "x"}\\n\')\n'
    )
    record = _of_program(tmp_path)
    assert (record.status, record.message) == ("ok", None)
    assert record.processes[0].phases[1].passes == 1500


def _of_program(folder: Path) -> Record:
    command = (sys.executable, "own.py")
    case = Case("own", "none", "script", "cpu", Plugin("script"), (Plugin("none"),), Plugin("script"), command=command)
    settings = Settings.model_validate({"timeout_s": 60})
    job = ScriptJob(id=case.id, repeat=0, device=_DEVICE, settings=settings, case=case)
    with contextlib.chdir(folder), LocalExecutor(Needs.of([job], folder), silent) as executor:
        return executor.measure(job)
