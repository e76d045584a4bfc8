"""A clean process that has imported what cases need and forks one worker at a time, or starts a program as one.

It speaks JSON, a message a packet, over the socket on its standard input. It watches that socket: when the runner
dies, however it dies, the worker and all its descendants are killed and the scratch folder, which the runner made, is
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
from pathlib import Path

from membench.data import corpus
from membench.host import procfs, scratch
from membench.protocol import marks
from membench.worker import allocator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_WORKER_FAILED = 70
_CANNOT_BE_STARTED = 127  # as a shell has it
_GRACE_S = 0.5
"""Helpers of multiprocessing end by themselves when they see that their program has."""


def die_with_parent() -> None:
    """Be killed when the parent dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_descendants() -> None:
    """Kill and reap until none is left; whoever loses its parent becomes a child of this process."""
    while descendants := procfs.children(os.getpid()):
        _kill(descendants)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.002)


def _left_running() -> list[str]:
    """The names of descendants that do not end by themselves."""
    deadline = time.monotonic() + _GRACE_S
    while names := [name for pid in procfs.children(os.getpid()) if (name := procfs.running(pid)) is not None]:
        if time.monotonic() > deadline:
            break
        select.select([], [], [], 0.01)
    return sorted(names)


def _fork_worker(request: dict[str, object], pipe: int, output: int, server: socket.socket) -> int:
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
        from membench.worker import main

        main.main(request, socket.socket(fileno=os.dup(pipe)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _start_program(request: dict[str, object], pipe: int, errors: int, streams: list[int]) -> int:
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
        command = request["command"]
        assert isinstance(command, list)
        variables = {marks.CHANNEL_VARIABLE: f"{os.getpid()}:{channel}"}
        os.execve(command[0], command, {**os.environ, **variables})
    except OSError as error:
        print(f"cannot be started: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(_CANNOT_BE_STARTED)


def _spawn_worker(request: dict[str, object], pipe: int, output: int) -> int:
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
        self._worker = 0
        self._is_program = False
        # A pipe turns the signal of a dead child into something that select sees.
        self._wake, wake_end = os.pipe()
        os.set_blocking(wake_end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_end)

    def _tell(self, **message: object) -> None:
        self._server.sendall(json.dumps(message).encode())

    def serve(self) -> None:
        self._tell(ready=True)
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
                had_children = ended.si_pid == self._worker and procfs.waited_for_children(ended.si_pid)
                pid, status, usage = os.wait4(ended.si_pid, 0)
                if pid == self._worker:
                    self._worker = 0
                    ended_at_s = time.monotonic()
                    left = _left_running() if self._is_program else []
                    _kill_descendants()
                    scratch.empty(self._folder)
                    self._tell(
                        exited=status, peak_bytes=usage.ru_maxrss * 1024, had_children=had_children, left=left,
                        ended_at_s=ended_at_s, own_peak_bytes=procfs.resident().peak_bytes,
                    )  # fmt: skip

    def _obey(self) -> bool:
        """Do what the runner asks; False when it has gone."""
        data, descriptors, _, _ = socket.recv_fds(self._server, 2**20, 4)
        if not data:
            return False
        request = json.loads(data)
        if request.get("kill"):
            if self._worker:
                _kill([*procfs.children(self._worker), self._worker])
            return True
        request["scratch"] = str(self._folder)
        pipe, output, *streams = descriptors
        self._is_program = "command" in request
        if self._is_program:
            self._worker = _start_program(request, pipe, output, streams)
        elif request["isolation"] == "spawn":
            self._worker = _spawn_worker(request, pipe, output)
        else:
            self._worker = _fork_worker(request, pipe, output, self._server)
        for descriptor in descriptors:
            os.close(descriptor)
        self._tell(pid=self._worker)
        return True


def serve(folder: Path, preload: list[str]) -> None:
    """Import ``preload``, then serve requests until the runner closes the socket.

    Args:
        folder: the workers' scratch folder; emptied after each, removed at the end.
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
