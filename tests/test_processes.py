"""What is left when processes die: no other process, and no file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from membench.host import environment, procfs, scratch
from membench.running.fork_client import ForkServer

_HANGING = """\
[suite]
name = "hanging"
[matrix]
model = ["block"]
technique = ["hang", "bf16"]
workload = ["known-burst"]
[technique.hang]
use = "ends"
how = "hang"
note = {note}
[settings]
threads = 1
measured_steps = 1
timeout_s = 60
"""


class _Running:
    """A command line that hangs in a case whose worker has a child; a folder of its own holds the scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder / "temporary"
        self.temporary.mkdir()
        note = folder / "note"
        (folder / "hanging.toml").write_text(_HANGING.format(note=json.dumps(str(note))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "membench", "run", "hanging.toml"],
            cwd=folder, env={**os.environ, "TMPDIR": str(self.temporary)}, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        notes = [note.with_suffix(".worker"), note.with_suffix(".child")]
        wait_until(lambda: all(path.exists() and path.read_text() for path in notes))
        self.worker, self.child = (int(path.read_text()) for path in notes)
        self.fork_server = psutil.Process(self.worker).ppid()

    def scratch_folders(self) -> list[Path]:
        return [path for path in self.temporary.iterdir() if path.name.startswith("membench-")]

    def are_gone(self) -> bool:
        return all(map(_is_gone, (self.fork_server, self.worker, self.child)))


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture
def running(tmp_path: Path) -> Iterator[_Running]:
    running = _Running(tmp_path)
    with running.process:
        yield running
        running.process.kill()


def test_a_fork_server_that_is_killed_takes_the_workers_children_along(running: _Running) -> None:
    (first,) = running.scratch_folders()
    os.kill(running.fork_server, signal.SIGKILL)
    wait_until(running.are_gone)
    _, errors = running.process.communicate(timeout=60)
    assert running.process.returncode == 1
    assert [line.split()[0] for line in errors.splitlines()] == ["ok", "crashed", "ok"]
    assert not first.exists()
    assert running.scratch_folders() == []


def test_a_runner_that_is_killed_leaves_neither_processes_nor_files(running: _Running) -> None:
    assert len(running.scratch_folders()) == 1
    running.process.kill()
    running.process.communicate()
    wait_until(running.are_gone)
    wait_until(lambda: running.scratch_folders() == [])


def test_a_runner_that_is_asked_to_end_says_so_and_leaves_nothing(running: _Running) -> None:
    running.process.terminate()
    _, errors = running.process.communicate(timeout=60)
    assert running.process.returncode == 130
    assert "interrupted; what is done is kept. To go on: " in errors
    assert "Traceback" not in errors
    assert running.are_gone()
    assert running.scratch_folders() == []


def test_workers_have_the_wait_policy_of_a_users_process_and_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.WAIT_POLICY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    earlier = procfs.children(os.getpid())  # such as multiprocessing's own helper
    server = ForkServer([], threads=3)
    try:
        (pid,) = set(procfs.children(os.getpid())) - set(earlier)
        server.wait_until_ready(60)
        told = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    finally:
        server.close()
    assert {b"OMP_NUM_THREADS=3", b"OPENBLAS_NUM_THREADS=1"} <= set(told)
    assert not [one for one in told if one.startswith((b"OMP_WAIT_POLICY", b"GOMP_SPINCOUNT", b"KMP_BLOCKTIME"))]


def test_a_wait_policy_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert environment.worker_environment(2)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_only_folders_of_dead_runners_are_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = tmp_path / f"membench-{ended.pid}-abc"
    (dead / "inner").mkdir(parents=True)
    (dead / "inner" / "checkpoint").write_text("x")
    kept = [tmp_path / name for name in (f"membench-{os.getpid()}-abc", "membench-notes", f"other-{ended.pid}-abc")]
    for folder in kept:
        folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / f"membench-{ended.pid}-link"
    link.symlink_to(elsewhere)

    made = scratch.Scratch()
    assert not dead.exists()
    assert all(folder.exists() for folder in (*kept, elsewhere, link))
    assert made.path.name.startswith(f"membench-{os.getpid()}-")

    # A runner in another container has an id that means nothing here; its lock does.
    foreign = made.path.rename(tmp_path / f"membench-{ended.pid}-foreign")
    scratch.sweep(tmp_path)
    assert foreign.exists()
    made.remove()
    scratch.sweep(tmp_path)
    assert not foreign.exists()
