"""Time limits hold whatever does not answer: a worker, the fork server, a module that it imports; the next job runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment, procfs
from membench.host.device import Device
from membench.protocol import pickling
from membench.records.record import Record
from membench.running import fork_client, running_job
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import FunctionJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.suite.schema import Settings
from tests.test_processes import wait_until
from tests.test_script import measured

_DEVICE = Device.parse("cpu")


@pytest.fixture
def preload() -> tuple[str, ...]:
    return ("membench.worker.main",)


@pytest.fixture
def executor(tmp_path: Path, preload: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalExecutor]:
    for module, name, seconds in (
        (running_job, "_END_TIMEOUT_S", 2),
        (running_job, "_REPORT_TIMEOUT_S", 2),
        (fork_client, "_LEAST_ANSWER_TIMEOUT_S", 2),
        (fork_client, "_IMPORT_TIMEOUT_S", 30 if len(preload) == 1 else 2),
    ):
        monkeypatch.setattr(module, name, seconds)
    with LocalExecutor(Needs((_DEVICE,), 1, tmp_path, preload), silent) as executor:
        yield executor


@pytest.fixture
def measure(executor: LocalExecutor, tmp_path: Path) -> Callable[..., Record]:
    def measured(function: Callable[..., Any], *arguments: Any, timeout_s: float = 30) -> Record:
        call = pickling.as_bytes((function, arguments, {}), by_value=[sys.modules[__name__]])
        sent = pickling.FunctionCall(tuple(sys.path), str(tmp_path), environment.worker_environment(1), call)
        (tmp_path / "call").write_bytes(pickle.dumps(sent))
        job = FunctionJob(
            id="f", repeat=0, device=_DEVICE, model="file", workload="test", pickled=tmp_path / "call",
            raised=tmp_path / "raised",
            settings=Settings.model_validate({"measured_steps": 1, "timeout_s": timeout_s}),
        )  # fmt: skip
        return executor.measure(job)

    return measured


def _ids_in(path: Path) -> list[int]:
    return list(map(int, path.read_text().split()))


def _spin(path: str) -> None:
    """Runs in C, holds the interpreter's lock and takes no signal."""
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    re.match(r"(a*)*b", "a" * 60)


def _stop(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_the_server(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    os.kill(os.getppid(), signal.SIGSTOP)
    child = os.fork()
    if child == 0:
        os.setsid()
        Path(path).write_text(f"{Path(path).read_text()} {os.getpid()}")
    time.sleep(600)


def _stop_the_server_and_end(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    os.kill(os.getppid(), signal.SIGSTOP)


def _say_done_and_print(path: str) -> None:
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), b'{"event": "done"}\n')
                break
    ends_at_s = time.monotonic() + 60
    while time.monotonic() < ends_at_s:
        print("still here", flush=True)
        time.sleep(0.2)


def _lives(pid: int) -> bool:
    return procfs.running(pid) is not None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_spin, "not done after 5 s"),
        (_stop, "not done after 5 s"),
        (_stop_the_server, "not done after 5 s; it did not end within 2 s when it was to be killed"),
        (_stop_the_server_and_end, "measured, but the fork server did not report its end within 2 s"),
        (_say_done_and_print, "measured, but the fork server did not report its end within 2 s"),
    ],
)
def test_what_does_not_answer_is_a_timeout_and_nothing_of_it_is_left(
    measure: Callable[..., Record], tmp_path: Path, function: Callable[[str], None], message: str
) -> None:
    began_s = time.monotonic()
    record = measure(function, str(tmp_path / "ids"), timeout_s=5)  # it must be entered before, on a busy machine, too
    assert (record.status, record.message) == ("timeout", message)
    assert time.monotonic() - began_s < 45
    worker, server, *child = _ids_in(tmp_path / "ids")
    following = measure(int)
    assert following.status == "ok"
    assert not any(map(_lives, (worker, *child)))
    assert _lives(server) == (function in (_spin, _stop))


def test_a_fork_server_that_stopped_between_jobs_is_a_timeout_and_replaced(
    measure: Callable[..., Record], tmp_path: Path
) -> None:
    assert measure(lambda: Path("id").write_text(str(os.getppid()))).status == "ok"
    (server,) = _ids_in(tmp_path / "id")
    os.kill(server, signal.SIGSTOP)
    record = measure(int, timeout_s=1)
    assert (record.status, record.message) == ("timeout", "the fork server did not answer within 2 s")
    assert measure(int).status == "ok"
    assert not _lives(server)


class TestAnImportThatHangs:
    @pytest.fixture
    def preload(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
        folder = tmp_path / "modules"
        folder.mkdir()
        (folder / "hangs_here.py").write_text("import os, time\nif os.path.exists('hang'): time.sleep(600)\n")
        (tmp_path / "hang").touch()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ['PYTHONPATH']}")
        return ("hangs_here", "membench.worker.main")

    def test_is_a_timeout_that_names_the_module(self, measure: Callable[..., Record], tmp_path: Path) -> None:
        record = measure(int, timeout_s=1)
        said = "the fork server did not answer within 3 s: it is importing 'hangs_here'"
        assert (record.status, record.message) == ("timeout", said)
        (tmp_path / "hang").unlink()
        assert measure(int).status == "ok"


@pytest.mark.parametrize("writes", [False, True])
def test_output_that_a_process_elsewhere_holds_open_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    """A program passes its standard error to a process that is no child of it, as daemons get it."""
    monkeypatch.setattr(running_job, "_LONGEST_DRAIN_S", 4)
    held: list[int] = []
    is_over = threading.Event()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()

        def accept() -> None:
            with listening.accept()[0] as connection:
                held.extend(socket.recv_fds(connection, 1, 1)[1])
            while writes and not is_over.wait(0.2) and time.monotonic() - began_s < 40:
                with contextlib.suppress(BrokenPipeError):
                    os.write(held[0], b"still here\n")

        receiving = threading.Thread(target=accept, daemon=True)
        began_s = time.monotonic()
        receiving.start()
        record = measured(
            tmp_path,
            "import socket, sys\nwith socket.socket(socket.AF_UNIX) as s:\n"
            f"    s.connect({str(tmp_path / 'socket')!r}); socket.send_fds(s, [b'x'], [2])\n",
        )
        took_s = time.monotonic() - began_s
        is_over.set()
        receiving.join()
    wait_until(lambda: bool(held))
    os.close(held[0])
    assert record.status == "ok"
    assert took_s < 30
