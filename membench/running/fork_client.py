"""Client of the fork server: starts and kills workers, and receives their exit statuses."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from membench.errors import MembenchError
from membench.host import environment
from membench.host.scratch import Scratch
from membench.protocol import forking

_START_TIMEOUT_S = 300
_ANSWER_TIMEOUT_S = 60
_END_TIMEOUT_S = 5
_LARGEST_MESSAGE_BYTES = 65536

_A = TypeVar("_A", bound=forking.Answer)


class ForkServerLost(MembenchError):
    """The fork server ended or did not answer."""


class ForkServer:
    """A fork server and the socket to it. Imports start at once; ``wait_until_ready`` waits for them.

    Raises:
        MembenchError: if there is no room for the workers' files.
        ForkServerLost: if the fork server cannot be started.
    """

    def __init__(self, preload: Sequence[str], threads: int | None, variables: Mapping[str, str] | None = None) -> None:
        """Start the fork server.

        Args:
            preload: modules that the fork server imports.
            threads: number of threads of a worker; ``None`` leaves the environment as it is.
            variables: environment variables that are set for workers only.
        """
        self._scratch = Scratch()
        # Packets keep two messages apart.
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the server
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "membench.worker.fork_server", str(self._scratch.path), *preload],
                stdin=child.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**environment.worker_environment(threads), **(variables or {})},
                start_new_session=True,  # Ctrl-C in the terminal must reach only the runner
            )
        except OSError as error:
            self._socket.close()
            self._errors.close()
            self._scratch.remove()
            raise ForkServerLost(f"the fork server cannot be started: {error.strerror}") from None
        finally:
            child.close()
        self._ready = False
        self._ended_early: collections.deque[forking.WorkerEnded] = collections.deque()

    def wait_until_ready(self) -> None:
        """Wait until workers can be started.

        Raises:
            ForkServerLost: if the fork server cannot start, with the last line of its standard error.
        """
        if not self._ready:
            self._answer(forking.Ready, _START_TIMEOUT_S)
            self._ready = True

    def fileno(self) -> int:
        """Return the descriptor for ``select``: readable when a worker has ended.

        ``next_ended`` may return workers for which the descriptor is no longer readable.
        """
        return self._socket.fileno()

    def _answer(self, expected: type[_A], timeout_s: float) -> _A:
        """Return the next answer of a type. Ends of workers received before it are kept for ``next_ended``."""
        while True:
            answer = self._receive(timeout_s)
            if isinstance(answer, expected):
                return answer
            if isinstance(answer, forking.WorkerEnded):
                self._ended_early.append(answer)

    def _receive(self, timeout_s: float) -> forking.Answer:
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_LARGEST_MESSAGE_BYTES)
        except TimeoutError:
            raise ForkServerLost(f"the fork server did not answer within {timeout_s:g} s") from None
        except ConnectionResetError:
            data = b""
        if not data:
            self._errors.seek(0)
            written = self._errors.read().decode(errors="replace").strip().splitlines()
            raise ForkServerLost(f"the fork server ended unexpectedly: {written[-1] if written else 'without a word'}")
        try:
            return forking.decode_answer(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ForkServerLost(f"the fork server sent what is no answer: {data[:80]!r}") from None

    def start(self, order: forking.StartWorker | forking.StartProgram, descriptors: Sequence[int]) -> int:
        """Start a worker and return its process id.

        Args:
            descriptors: those of its pipe and its output; for a program, also of its standard input and output.

        Raises:
            ForkServerLost: if the fork server is gone.
        """
        try:
            socket.send_fds(self._socket, [forking.encode_order(order)], list(descriptors))
        except OSError as error:
            raise ForkServerLost(f"the fork server is gone: {error.strerror}") from None
        return self._answer(forking.Started, _ANSWER_TIMEOUT_S).pid

    def next_ended(self, *, wait: bool) -> forking.WorkerEnded | None:
        """Return how the next worker ended; ``None`` if none has ended and ``wait`` is false."""
        if self._ended_early:
            return self._ended_early.popleft()
        return self._answer(forking.WorkerEnded, _ANSWER_TIMEOUT_S) if wait else None

    def kill(self) -> None:
        """Kill all workers and their descendants."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(forking.encode_order(forking.Kill()))

    def close(self) -> None:
        """End the fork server and all processes it started, and remove the workers' files."""
        self._socket.close()
        pid = self._process.pid
        # The process is reaped last: until then the kernel does not reuse its id.
        with open(os.pidfd_open(pid), "rb", buffering=0) as ended:
            # A server that is still importing does not read the socket and has nothing to clean up.
            if not select.select([ended], [], [], _END_TIMEOUT_S if self._ready else 0)[0]:
                _kill(pid)
        # A killed fork server leaves the children of its workers behind.
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (left := _in_session(pid)) and time.monotonic() < deadline:
            for member in left:
                _kill(member)
            time.sleep(0.002)
        self._process.wait()
        self._errors.close()
        self._scratch.remove()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _in_session(leader: int) -> list[int]:
    """Return the ids of the living processes in a leader's session or process group."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, group, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            if leader in (int(group), int(session)) and state not in "ZX":
                found.append(int(pid))
    return found
