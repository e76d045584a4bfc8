"""Status and remarks for the end of a user's program."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from membench.records.record import Status

_LONGEST_LINE = 300
_OUT_OF_MEMORY = re.compile(r"([\w.]*\.)?(MemoryError|OutOfMemoryError)\b|.*can(not|'t) allocate memory", re.IGNORECASE)


def last_line(tail: bytes) -> str:
    """Return the last line that is not empty of a program's standard error."""
    lines = [line.strip() for line in re.split(r"[\r\n]", tail.decode(errors="replace"))]
    return next((line[:_LONGEST_LINE] for line in reversed(lines) if line), "")


def outcome(status: int, line: str) -> tuple[Status, str] | None:
    """Return status and message of a program that failed by itself; ``None`` if it succeeded or a signal ended it.

    Args:
        status: the exit status as returned by ``os.waitpid``.
        line: the last line of its standard error.
    """
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    if code == 0:
        return None
    return ("out-of-memory" if _OUT_OF_MEMORY.match(line) else "failed"), f"ended with exit code {code}"


def leftover_remarks(left: Sequence[str]) -> list[str]:
    """Return a remark on processes that outlived their program."""
    if not left:
        return []
    what = "a process" if len(left) == 1 else f"{len(left)} processes"
    return [f"{what} outlived the script and {'was' if len(left) == 1 else 'were'} killed: {', '.join(left)}"]
