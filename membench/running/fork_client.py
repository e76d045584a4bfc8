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
from membench.host import environment, procfs
from membench.host.scratch import Scratch
from membench.protocol import forking

_IMPORT_TIMEOUT_S = 30
"""Seconds that imports may take beyond the time limit of a job."""
_ANSWER_TIMEOUT_S, _LEAST_ANSWER_TIMEOUT_S = 60, 10
_END_TIMEOUT_S = 5
_LARGEST_MESSAGE_BYTES = 65536

_A = TypeVar("_A", bound=forking.Answer)


class ForkServerLost(MembenchError):
    """The fork server ended or did not answer."""


class ForkServerSilent(ForkServerLost):
    """The fork server did not answer in time."""


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
        self._importing = ""
        self._ended_early: collections.deque[forking.WorkerEnded] = collections.deque()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until workers can be started.

        Args:
            timeout_s: the time limit of the job that waits; imports may take somewhat longer.

        Raises:
            ForkServerLost: if the fork server cannot start, with the last line of its standard error.
            ForkServerSilent: if its imports do not end in time, with the module that it is importing.
        """
        if not self._ready:
            self._answer(forking.Ready, timeout_s + _IMPORT_TIMEOUT_S)
            self._ready = True

    def fileno(self) -> int:
        """Return the descriptor for ``select``: readable when a worker has ended.

        ``next_ended`` may return workers for which the descriptor is no longer readable.
        """
        return self._socket.fileno()

    def _answer(self, expected: type[_A], timeout_s: float) -> _A:
        """Return the next answer of a type. Ends of workers received before it are kept for ``next_ended``."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._receive(deadline, timeout_s)
            if isinstance(answer, expected):
                return answer
            if isinstance(answer, forking.WorkerEnded):
                self._ended_early.append(answer)
            elif isinstance(answer, forking.Importing):
                self._importing = answer.module

    def _receive(self, deadline: float, timeout_s: float) -> forking.Answer:
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(_LARGEST_MESSAGE_BYTES)
        except TimeoutError:
            doing = f": it is importing '{self._importing}'" if self._importing and not self._ready else ""
            raise ForkServerSilent(f"the fork server did not answer within {timeout_s:g} s{doing}") from None
        except ConnectionResetError:
            data = b""
        if not data:
            self._errors.seek(0)
            written = self._errors.read().decode(errors="replace").strip().splitlines()
            raise ForkServerLost(f"the fork server ended unexpectedly: {written[-1] if written else 'without a word'}")
        try:
            return forking.decode_answer(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ForkServerLost(f"the fork server sent an invalid answer: {data[:80]!r}") from None

    def start(
        self, order: forking.StartWorker | forking.StartProgram, descriptors: Sequence[int], timeout_s: float
    ) -> forking.Started:
        """Start a worker.

        Args:
            descriptors: those of its pipe and its output; for a program, also of its standard input and output.
            timeout_s: the time limit of the job.

        Raises:
            ForkServerLost: if the fork server is gone.
            ForkServerSilent: if it does not answer.
        """
        self._socket.settimeout(_LEAST_ANSWER_TIMEOUT_S)
        try:
            socket.send_fds(self._socket, [forking.encode_order(order)], list(descriptors))
        except TimeoutError:
            raise ForkServerSilent("the fork server takes no orders") from None
        except OSError as error:
            raise ForkServerLost(f"the fork server is gone: {error.strerror}") from None
        within_s = max(_LEAST_ANSWER_TIMEOUT_S, min(_ANSWER_TIMEOUT_S, timeout_s))
        return self._answer(forking.Started, within_s)

    def next_ended(self, *, wait: bool) -> forking.WorkerEnded | None:
        """Return how the next worker ended; ``None`` if none has ended and ``wait`` is false."""
        if self._ended_early:
            return self._ended_early.popleft()
        return self._answer(forking.WorkerEnded, _LEAST_ANSWER_TIMEOUT_S) if wait else None

    def kill(self) -> None:
        """Have all workers and their descendants killed. That it was done is known only from their ends."""
        with contextlib.suppress(OSError):
            self._socket.settimeout(_LEAST_ANSWER_TIMEOUT_S)
            self._socket.sendall(forking.encode_order(forking.Kill()))

    def close(self, *, answers: bool = True) -> list[str]:
        """End the fork server and all processes it started, and remove the workers' files.

        Args:
            answers: whether the fork server may be expected to end by itself.

        Returns:
            names and ids of the processes that cannot be killed.
        """
        self._socket.close()
        pid, started = self._process.pid, []
        # The process is reaped last: until then the kernel does not reuse its id.
        with open(os.pidfd_open(pid), "rb", buffering=0) as ended:
            # A server that is still importing does not read the socket and has nothing to clean up.
            if not select.select([ended], [], [], _END_TIMEOUT_S if self._ready and answers else 0)[0]:
                # Some may be in sessions of their own, and would be nobody's descendants once it is killed.
                started = procfs.children(pid)
                _kill(pid)
        # A killed fork server leaves the children of its workers behind.
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (left := _left(pid, started)) and time.monotonic() < deadline:
            for member in left:
                _kill(member)
            time.sleep(0.002)
        unkilled = procfs.named(left)
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            unkilled = list(dict.fromkeys([*unkilled, *procfs.named([pid])]))
        self._errors.close()
        self._scratch.remove()
        return unkilled


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        os.kill(pid, signal.SIGKILL)


def _left(leader: int, started: Sequence[int]) -> list[int]:
    """Return the living processes among those that a fork server started and those in its session."""
    return list(dict.fromkeys([*_in_session(leader), *(pid for pid in started if procfs.running(pid) is not None)]))


def _in_session(leader: int) -> list[int]:
    """Return the ids of the living processes in a leader's session or process group."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, group, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            if leader in (int(group), int(session)) and state not in "ZX":
                found.append(int(pid))
    return found
