"""The runner's end of the fork server: starts workers, kills them, hears how they ended."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from membench import environment
from membench.errors import MembenchError

_START_TIMEOUT_S = 300
_ANSWER_TIMEOUT_S = 60
_LARGEST_MESSAGE_BYTES = 65536


class NurseryLost(MembenchError):
    """The fork server is gone."""


class Nursery:
    """A fork server and the socket to it. It starts importing at once; ``wait_until_ready`` waits for it."""

    def __init__(self, preload: Sequence[str], threads: int) -> None:
        # Packets, so that two messages never run together.
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the nursery
        self._process = subprocess.Popen(
            [sys.executable, "-m", "membench.forkserver", *preload],
            stdin=child.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment.worker_environment(threads),
            start_new_session=True,  # a Ctrl-C in the terminal is for the runner alone
        )
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

    def start(self, request: Mapping[str, Any], pipe: socket.socket, output: int) -> int:
        """Start a worker that speaks over ``pipe`` and prints to ``output``; its process id."""
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [pipe.fileno(), output])
        except OSError as error:
            raise NurseryLost(f"the fork server is gone: {error.strerror}") from None
        return int(self._answer(_ANSWER_TIMEOUT_S)["pid"])

    def exit_status(self) -> int:
        """How the worker ended, as ``os.waitpid`` says it; waits for it."""
        return int(self._answer(_ANSWER_TIMEOUT_S)["exited"])

    def kill(self) -> None:
        """Kill the worker and its descendants."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(b'{"kill": true}')

    def close(self) -> None:
        """End the fork server, and with it whatever still runs."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()
