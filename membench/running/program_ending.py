"""Status and remarks for the end of a user's program."""

from __future__ import annotations

import os
from collections.abc import Sequence

from membench.host import last_words
from membench.host.last_words import LastWords
from membench.records.record import Status

_KILLED = 128 + 9
"""The exit code of a shell whose command was killed by SIGKILL."""


def outcome(status: int, words: LastWords, tail: str, *, kernel_killed: bool) -> tuple[Status, str] | None:
    """Return status and message of a program that failed by itself; ``None`` if it succeeded or a signal ended it.

    Args:
        status: the exit status as returned by ``os.waitpid``.
        words: the last words of its standard error, and ``tail`` its end.
        kernel_killed: whether the kernel has killed any process for lack of memory since the program was started.
    """
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    if code == 0:
        return None
    message = f"ended with exit code {code}"
    if kernel_killed and (code == _KILLED or last_words.tell_of_a_kill(tail)):
        return "out-of-memory", f"{message} after the kernel had killed a process of it for lack of memory"
    return ("out-of-memory" if words.are_of_memory else "failed"), message


def leftover_remarks(left: Sequence[str]) -> list[str]:
    """Return a remark on processes that outlived their program."""
    if not left:
        return []
    what = "a process" if len(left) == 1 else f"{len(left)} processes"
    return [f"{what} outlived the script and {'was' if len(left) == 1 else 'were'} killed: {', '.join(left)}"]
