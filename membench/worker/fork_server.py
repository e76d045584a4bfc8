"""The fork server: a clean process that imports what cases need and forks the workers of one job, or starts a program.

It communicates by ``protocol.forking`` over the socket on its standard input. When the runner ends in any way, the
socket closes; the fork server then kills the workers and all their descendants, and removes the scratch folder that the
runner made.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from membench.data import corpus
from membench.host import procfs, scratch
from membench.protocol import forking, marks
from membench.worker import allocator, launcher
from membench.worker.python_blocks import FilledBlocks

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_WORKER_FAILED = 70
_KILL_TIMEOUT_S = 5
_CANNOT_BE_STARTED = 127  # the exit code that shells use for a command that was not found


class _Started(NamedTuple):
    """A worker or program that runs: when it began, and at most how much of its peak is its launcher's."""

    pid: int
    at_s: float
    inherited_peak_bytes: int = 0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            os.kill(pid, signal.SIGKILL)


def _kill_descendants(keep: Collection[int] = ()) -> list[str]:
    """Kill and reap all descendants. Orphaned ones are found, too, since they become children of this process.

    Args:
        keep: workers to leave running, with their descendants.

    Returns:
        names and ids of those that cannot be killed, because the kernel holds them or they belong to another user.
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while descendants := _descendants(keep):
        _kill(descendants)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            return procfs.named(descendants)
        select.select([], [], [], 0.002)
    return []


def _descendants(keep: Collection[int]) -> list[int]:
    kept = {pid for worker in keep for pid in (worker, *procfs.children(worker))}
    return [pid for pid in procfs.children(os.getpid()) if pid not in kept]


def _left_running(grace_s: float, keep: Collection[int]) -> list[str]:
    """Return the names of descendants that are still running after a grace period, in seconds; none if it is 0."""
    if not grace_s:
        return []
    deadline = time.monotonic() + grace_s
    while names := [name for pid in _descendants(keep) if (name := procfs.running(pid)) is not None]:
        if time.monotonic() > deadline:
            break
        select.select([], [], [], 0.01)
    return sorted(names)


def _fork_worker(request: Mapping[str, Any], pipe: int, output: int, server: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = _WORKER_FAILED
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        server.close()
        os.close(0)
        os.open(os.devnull, os.O_RDONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from membench.protocol import requests
        from membench.worker import main

        main.main(requests.decode(request), socket.socket(fileno=os.dup(pipe)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _start_program(order: forking.StartProgram, pipe: int, errors: int, streams: Sequence[int]) -> _Started:
    """Start a program as its user would, except for its standard error and a channel to mark phases.

    It has begun when this returns: what is read of its process is its own.

    Args:
        pipe: the channel for marks of phases.
        errors: its standard error.
        streams: its standard input and output.
    """
    answers, answers_end = os.pipe()
    launcher_pid = os.fork()
    if launcher_pid:
        os.close(answers_end)
        with os.fdopen(answers) as pipe_of_launcher:
            answer = pipe_of_launcher.read().split()
        if not answer:  # it could not be started itself, which it says, and ends like a program that cannot
            return _Started(launcher_pid, time.monotonic(), procfs.resident().peak_bytes)
        return _Started(int(answer[0]), float(answer[1]), int(answer[2]))
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, given in enumerate((*streams, errors)):
            os.dup2(given, descriptor)
        channel = os.dup(pipe)
        for descriptor in (channel, answers_end):
            os.set_inheritable(descriptor, True)
        launch = [str(answers_end), marks.CHANNEL_VARIABLE, str(channel), *order.command]
        os.environ.update(order.variables)
        os.execv(sys.executable, [sys.executable, "-I", "-S", launcher.__file__, *launch])
    except OSError as error:
        print(f"cannot be started: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(_CANNOT_BE_STARTED)


def _spawn_worker(request: Mapping[str, Any], pipe: int, output: int) -> int:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "membench.worker.main", str(pipe)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[pipe],
        preexec_fn=die_with_parent,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    process.returncode = 0  # so that subprocess does not reap it; ``_Server`` does
    return process.pid


class _Server:
    def __init__(self, server: socket.socket, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._workers: dict[int, int] = {}  # by id, what it inherited of its peak
        self._grace_s = 0.0
        # The signal of an ended child is written to a pipe, so that select wakes up.
        self._child_ended, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_end)

    def _answer(self, answer: forking.Answer) -> None:
        self._server.sendall(forking.encode_answer(answer))

    def serve(self) -> None:
        """Handle orders until the runner closes the socket."""
        self._answer(forking.Ready())
        while True:
            ready, _, _ = select.select([self._server.fileno(), self._child_ended], [], [])
            if self._child_ended in ready:
                os.read(self._child_ended, 4096)
                self._reap()
            if self._server.fileno() in ready and not self._handle_order():
                return

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                # Read what the kernel knows of the process before it is reaped.
                is_worker = ended.si_pid in self._workers
                had_children = is_worker and procfs.waited_for_children(ended.si_pid)
                pid, status, usage = os.wait4(ended.si_pid, 0)
                if is_worker:
                    self._clean_up(pid, self._workers.pop(pid), status, usage, had_children)

    def _clean_up(
        self, pid: int, inherited_peak_bytes: int, status: int, usage: resource.struct_rusage, had_children: bool
    ) -> None:
        """Kill the descendants of an ended worker, and report how it ended.

        The workers' files are removed after the last worker of the job.
        """
        ended_at_s = time.monotonic()
        left = _left_running(self._grace_s, keep=self._workers)
        unkilled = _kill_descendants(keep=self._workers)
        if not self._workers:
            scratch.empty(self._folder)
        ended = forking.WorkerEnded(
            pid, status, ended_at_s, usage.ru_maxrss * 1024, inherited_peak_bytes, had_children, tuple(left),
            tuple(unkilled), usage.ru_utime + usage.ru_stime,
        )  # fmt: skip
        self._answer(ended)

    def _handle_order(self) -> bool:
        """Execute the runner's next order; return ``False`` if the runner has closed the socket."""
        data, descriptors, _, _ = socket.recv_fds(self._server, 2**20, 4)
        if not data:
            return False
        order = forking.decode_order(data)
        if isinstance(order, forking.Kill):
            for worker in self._workers:
                _kill([*procfs.children(worker), worker])
            return True
        started = self._start(order, descriptors)
        self._workers[started.pid] = started.inherited_peak_bytes
        self._grace_s = order.grace_s
        for descriptor in descriptors:
            os.close(descriptor)
        self._answer(forking.Started(started.pid, started.at_s))
        return True

    def _start(self, order: forking.StartWorker | forking.StartProgram, descriptors: Sequence[int]) -> _Started:
        pipe, output, *streams = descriptors
        if isinstance(order, forking.StartProgram):
            return _start_program(order, pipe, output, streams)
        at_s = time.monotonic()
        folder = self._folder / f"rank-{order.rank}"
        with contextlib.suppress(OSError):  # a worker without its folder fails by itself when it needs it
            folder.mkdir(exist_ok=True)
        request = {**order.request, "scratch": str(folder)}
        if order.isolation == "spawn":
            return _Started(_spawn_worker(request, pipe, output), at_s)
        return _Started(_fork_worker(request, pipe, output, self._server), at_s)


def serve(folder: Path, preload: list[str]) -> None:
    """Import modules, then serve requests until the runner closes the socket.

    Args:
        folder: the folder for the workers' files; emptied after each job, removed at the end.
        preload: the names of the modules to import.
    """
    from membench.host import import_path

    import_path.add_current_folder()
    server = socket.socket(fileno=os.dup(0))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        for name in preload:
            server.sendall(forking.encode_answer(forking.Importing(name)))
            # A module that cannot be imported fails again in the worker that needs it, where the error is reported.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        if preload:
            corpus.read()  # saves each case some 40 ms
        allocator.settle()
        gc.freeze()
        filled = FilledBlocks()
        filled.fill()  # once for all workers, which inherit it
        _Server(server, folder).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        _kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
