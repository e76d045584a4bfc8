"""The pipe and the output of a rank, between the runner and the process."""

from __future__ import annotations

import os
import socket

from membench.protocol.messages import BrokenMessage
from membench.units import format_bytes


class Channels:
    """The pipe and the output of a rank: both the ends of this process and those of the rank."""

    def __init__(self) -> None:
        self.pipe, self._their_pipe = socket.socketpair()
        self.output, self._their_output = os.pipe()
        self.is_broken = False
        self._unread = bytearray()

    def lines(self, data: bytes, longest_bytes: int) -> list[bytes]:
        """Return the lines that data from the pipe complete, and keep the rest for the next call.

        Raises:
            BrokenMessage: if the rest is longer than any message.
        """
        head, end, rest = data.rpartition(b"\n")
        found = bytes(self._unread + head).split(b"\n") if end else []
        if end:
            self._unread.clear()
        self._unread += rest
        if len(self._unread) > longest_bytes:
            raise BrokenMessage(f"a line over the worker's pipe has no end after {format_bytes(longest_bytes)}")
        return found

    def for_rank(self) -> tuple[int, int]:
        """Return the descriptors that the rank inherits: its pipe and its output."""
        return self._their_pipe.fileno(), self._their_output

    def close_for_rank(self) -> None:
        """Close the rank's ends here. Without this, end of file is not seen when the rank closes them."""
        if self._their_output >= 0:
            self._their_pipe.close()
            os.close(self._their_output)
            self._their_output = -1

    def close(self) -> None:
        """Close all descriptors."""
        self.close_for_rank()
        self.pipe.close()
        os.close(self.output)
