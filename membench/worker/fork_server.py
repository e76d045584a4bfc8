"""A clean process that has imported what cases need and forks the workers of one job at a time, or starts a program.

It speaks ``protocol.forking`` over the socket on its standard input. It watches that socket: when the runner dies,
however it dies, the workers and all their descendants are killed and the scratch folder, which the runner made, is
removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
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
from typing import Any

from membench.data import corpus
from membench.host import procfs, scratch
from membench.protocol import forking, marks
from membench.worker import allocator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_WORKER_FAILED = 70
_CANNOT_BE_STARTED = 127  # as a shell has it


def die_with_parent() -> None:
    """Be killed when the parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_descendants(but: Collection[int] = ()) -> None:
    """Kill and reap until none is left; whoever loses its parent becomes a child of this process.

    Args:
        but: workers that go on, and what they have started.
    """
    while descendants := _descendants(but):
        _kill(descendants)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.002)


def _descendants(but: Collection[int]) -> list[int]:
    kept = {pid for worker in but for pid in (worker, *procfs.children(worker))}
    return [pid for pid in procfs.children(os.getpid()) if pid not in kept]


def _left_running(grace_s: float) -> list[str]:
    """The names of descendants that do not end by themselves within the grace that they have."""
    if not grace_s:
        return []
    deadline = time.monotonic() + grace_s
    while names := [name for pid in procfs.children(os.getpid()) if (name := procfs.running(pid)) is not None]:
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


def _start_program(command: Sequence[str], pipe: int, errors: int, streams: Sequence[int]) -> int:
    """Start a program as its user would, but for its standard error and a way to mark phases.

    Args:
        streams: its standard input and output.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores the last two
            signal.signal(number, signal.SIG_DFL)
        for descriptor, given in enumerate((*streams, errors)):
            os.dup2(given, descriptor)
        channel = os.dup(pipe)
        os.set_inheritable(channel, True)
        variables = {marks.CHANNEL_VARIABLE: f"{os.getpid()}:{channel}"}
        os.execve(command[0], list(command), {**os.environ, **variables})
    except OSError as error:
        print(f"cannot be started: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(_CANNOT_BE_STARTED)


def _spawn_worker(request: Mapping[str, Any], pipe: int, output: int) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "membench.worker.main", str(pipe)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[pipe],
        preexec_fn=die_with_parent,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    process.returncode = 0  # the loop below reaps it, not subprocess
    return process.pid


class _Server:
    def __init__(self, server: socket.socket, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._workers: set[int] = set()
        self._grace_s = 0.0
        # A pipe turns the signal of a dead child into something that select sees.
        self._wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_end)

    def _tell(self, answer: forking.Answer) -> None:
        self._server.sendall(forking.encode_answer(answer))

    def serve(self) -> None:
        self._tell(forking.Ready())
        while True:
            ready, _, _ = select.select([self._server.fileno(), self._wake], [], [])
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap()
            if self._server.fileno() in ready and not self._obey():
                return

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                # As long as it is not reaped, the kernel tells of it.
                is_worker = ended.si_pid in self._workers
                had_children = is_worker and procfs.waited_for_children(ended.si_pid)
                pid, status, usage = os.wait4(ended.si_pid, 0)
                if is_worker:
                    self._workers.remove(pid)
                    self._put_away(pid, status, usage.ru_maxrss * 1024, had_children)

    def _put_away(self, pid: int, status: int, peak_bytes: int, had_children: bool) -> None:
        """Kill what a worker left behind, and answer how it ended; its files go with those of the job's last worker."""
        ended_at_s = time.monotonic()
        left = _left_running(self._grace_s)
        _kill_descendants(but=self._workers)
        if not self._workers:
            scratch.empty(self._folder)
        self._tell(
            forking.WorkerEnded(
                pid, status, ended_at_s, peak_bytes, procfs.resident().peak_bytes, had_children, tuple(left)
            )
        )

    def _obey(self) -> bool:
        """Do what the runner asks; False when it has gone."""
        data, descriptors, _, _ = socket.recv_fds(self._server, 2**20, 4)
        if not data:
            return False
        order = forking.decode_order(data)
        if isinstance(order, forking.Kill):
            for worker in self._workers:
                _kill([*procfs.children(worker), worker])
            return True
        worker = self._started(order, descriptors)
        self._workers.add(worker)
        self._grace_s = order.grace_s
        for descriptor in descriptors:
            os.close(descriptor)
        self._tell(forking.Started(worker))
        return True

    def _started(self, order: forking.StartWorker | forking.StartProgram, descriptors: Sequence[int]) -> int:
        pipe, output, *streams = descriptors
        if isinstance(order, forking.StartProgram):
            return _start_program(order.command, pipe, output, streams)
        folder = self._folder / f"rank-{order.rank}"
        folder.mkdir(exist_ok=True)
        request = {**order.request, "scratch": str(folder)}
        if order.isolation == "spawn":
            return _spawn_worker(request, pipe, output)
        return _fork_worker(request, pipe, output, self._server)


def serve(folder: Path, preload: list[str]) -> None:
    """Import ``preload``, then serve requests until the runner closes the socket.

    Args:
        folder: for the workers' files; emptied after each job, removed at the end.
    """
    server = socket.socket(fileno=os.dup(0))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in preload:
        # What cannot be imported here fails again in the worker that needs it, and is told there.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if preload:
        corpus.read()  # some 40 ms that no case has to take
    allocator.settle()
    gc.freeze()
    try:
        _Server(server, folder).serve()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        _kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2:])
