"""The runner's end of the fork server: starts workers, kills them, hears how they ended."""

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
    """The fork server is gone."""


class ForkServer:
    """A fork server and the socket to it. It starts importing at once; ``wait_until_ready`` waits for it.

    Raises:
        MembenchError: if there is no room for the workers' files.
        ForkServerLost: if the fork server cannot be started.
    """

    def __init__(self, preload: Sequence[str], threads: int | None, variables: Mapping[str, str] | None = None) -> None:
        """Start it.

        Args:
            threads: of a worker; ``None`` leaves the environment as it is.
            variables: of the environment, for workers alone.
        """
        self._scratch = Scratch()
        # Packets, so that two messages never run together.
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the server
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "membench.worker.fork_server", str(self._scratch.path), *preload],
                stdin=child.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**environment.worker_environment(threads), **(variables or {})},
                start_new_session=True,  # a Ctrl-C in the terminal is for the runner alone
            )
        except OSError as error:
            self._socket.close()
            self._errors.close()
            self._scratch.remove()
            raise ForkServerLost(f"the fork server cannot be started: {error.strerror}") from None
        finally:
            child.close()
        self._ready = False
        self._have_ended: collections.deque[forking.WorkerEnded] = collections.deque()

    def wait_until_ready(self) -> None:
        """Return once workers can be started.

        Raises:
            ForkServerLost: if the fork server cannot start, with the last line it wrote.
        """
        if not self._ready:
            self._answer(forking.Ready, _START_TIMEOUT_S)
            self._ready = True

    def fileno(self) -> int:
        """For ``select``: readable when a worker has ended; ``ended`` may have more than it shows."""
        return self._socket.fileno()

    def _answer(self, wanted: type[_A], timeout_s: float) -> _A:
        """The next answer of a kind; a worker's end that comes before it is kept for ``ended``."""
        while True:
            answer = self._received(timeout_s)
            if isinstance(answer, wanted):
                return answer
            if isinstance(answer, forking.WorkerEnded):
                self._have_ended.append(answer)

    def _received(self, timeout_s: float) -> forking.Answer:
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
        return forking.decode_answer(data)

    def start(self, order: forking.StartWorker | forking.StartProgram, descriptors: Sequence[int]) -> int:
        """Start a worker; its process id.

        Args:
            descriptors: of its pipe and its output; of a program also its standard input and output.
        """
        try:
            socket.send_fds(self._socket, [forking.encode_order(order)], list(descriptors))
        except OSError as error:
            raise ForkServerLost(f"the fork server is gone: {error.strerror}") from None
        return self._answer(forking.Started, _ANSWER_TIMEOUT_S).pid

    def ended(self, *, wait: bool) -> forking.WorkerEnded | None:
        """How the next worker ended; ``None``: none has, and it is not to be waited for."""
        if self._have_ended:
            return self._have_ended.popleft()
        return self._answer(forking.WorkerEnded, _ANSWER_TIMEOUT_S) if wait else None

    def kill(self) -> None:
        """Kill all workers and their descendants."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(forking.encode_order(forking.Kill()))

    def close(self) -> None:
        """End the fork server, and with it whatever still runs; remove the workers' files."""
        self._socket.close()
        pid = self._process.pid
        # It is not reaped before the end: as long as its id is taken, no other process can get it.
        with open(os.pidfd_open(pid), "rb", buffering=0) as ended:
            # One that is still importing hears nothing, and has nothing to put away.
            if not select.select([ended], [], [], _END_TIMEOUT_S if self._ready else 0)[0]:
                _kill(pid)
        # A fork server that was killed has left its workers' children behind.
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
    """The living processes of a leader's session or process group."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, _, group, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
            if leader in (int(group), int(session)) and state not in "ZX":
                found.append(int(pid))
    return found
