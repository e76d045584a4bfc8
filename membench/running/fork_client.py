"""The runner's end of the fork server: starts workers, kills them, hears how they ended."""

from __future__ import annotations

import contextlib
import json
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
from typing import Any, NamedTuple

from membench.errors import MembenchError
from membench.host import environment
from membench.host.scratch import Scratch

_START_TIMEOUT_S = 300
_ANSWER_TIMEOUT_S = 60
_END_TIMEOUT_S = 5
_LARGEST_MESSAGE_BYTES = 65536


class NurseryLost(MembenchError):
    """The fork server is gone."""


class Ended(NamedTuple):
    """How a worker ended.

    Attributes:
        status: as ``os.waitpid`` says it.
        at_s: when, by the monotonic clock.
        peak_bytes: the kernel's peak since it was last reset: of the worker, of what it was forked from, or of a child
            that it waited for, whichever is the highest.
        forked_from_bytes: at most so much of that was there before a program was started.
        had_children: whether it waited for one.
        left: the names of processes that outlived a program, and were killed.
    """

    status: int
    at_s: float
    peak_bytes: int
    forked_from_bytes: int
    had_children: bool
    left: tuple[str, ...]


class Nursery:
    """A fork server and the socket to it. It starts importing at once; ``wait_until_ready`` waits for it.

    Raises:
        MembenchError: if there is no room for the workers' files.
        NurseryLost: if the fork server cannot be started.
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
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the nursery
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
            raise NurseryLost(f"the fork server cannot be started: {error.strerror}") from None
        finally:
            child.close()
        self._ready = False

    def wait_until_ready(self) -> None:
        """Return once workers can be started.

        Raises:
            NurseryLost: if the fork server cannot start, with the last line it wrote.
        """
        if not self._ready:
            self._answer(_START_TIMEOUT_S)
            self._ready = True

    def fileno(self) -> int:
        """For ``select``: readable when the worker has ended."""
        return self._socket.fileno()

    def _answer(self, timeout_s: float) -> Mapping[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_LARGEST_MESSAGE_BYTES)
        except TimeoutError:
            raise NurseryLost(f"the fork server did not answer within {timeout_s:g} s") from None
        except ConnectionResetError:
            data = b""
        if not data:
            self._errors.seek(0)
            written = self._errors.read().decode(errors="replace").strip().splitlines()
            raise NurseryLost(f"the fork server ended unexpectedly: {written[-1] if written else 'without a word'}")
        answer: Mapping[str, Any] = json.loads(data)
        return answer

    def start(self, request: Mapping[str, Any], pipe: socket.socket, output: int, streams: Sequence[int] = ()) -> int:
        """Start a worker that speaks over ``pipe`` and prints to ``output``; its process id.

        Args:
            streams: of a program, its standard input and output; ``output`` is its standard error then.
        """
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [pipe.fileno(), output, *streams])
        except OSError as error:
            raise NurseryLost(f"the fork server is gone: {error.strerror}") from None
        return int(self._answer(_ANSWER_TIMEOUT_S)["pid"])

    def ended(self) -> Ended:
        """How the worker ended; waits for it."""
        answer = self._answer(_ANSWER_TIMEOUT_S)
        return Ended(
            answer["exited"], answer["ended_at_s"], answer["peak_bytes"], answer["own_peak_bytes"],
            answer["had_children"], tuple(answer["left"]),
        )  # fmt: skip

    def kill(self) -> None:
        """Kill the worker and its descendants."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(b'{"kill": true}')

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
