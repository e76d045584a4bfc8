"""Where the ranks of a job were when its time was over: the one that hangs is told from those that wait for it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Sequence
from typing import NamedTuple

from membench.protocol.job import ASKS_WHERE
from membench.running.rank import Rank

_DUMP = "(most recent call first):"
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)')
_WAITS_FOR_OTHERS = re.compile(r"/torch/(?:distributed/|autograd/graph\.py|_ops\.py)")
"""Files of torch whose functions wait for other ranks: collectives, and the backward pass in which hooks call them."""


class Frame(NamedTuple):
    """A call that a rank was in."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"in {self.function} ({os.path.basename(self.file)}, line {self.line})"


def ask(rank: Rank) -> None:
    """Have a worker write its stack to its output; it does so even while it waits in a library."""
    if rank.pid is not None:
        with contextlib.suppress(OSError):  # it has ended
            os.kill(rank.pid, signal.Signals[ASKS_WHERE])


def frames(said: str) -> Sequence[Frame]:
    """Return the calls of the last stack in an output, the innermost first; none without one.

    Source: ``faulthandler``.
    """
    _, dump, stack = said.rpartition(_DUMP)
    return [Frame(**found.groupdict()) for line in stack.splitlines() if (found := _FRAME.match(line))] if dump else []


def waits_for_others(rank: Rank) -> bool:
    """Whether a rank was seen to wait for others, in a collective or in a backward pass that calls them."""
    return any(_WAITS_FOR_OTHERS.search(frame.file) for frame in frames(rank.said)[:4])
