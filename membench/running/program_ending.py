"""How a user's program ended, in a status and in words."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from membench.records.record import Status

_LONGEST_LINE = 300
_OUT_OF_MEMORY = re.compile(r"([\w.]*\.)?(MemoryError|OutOfMemoryError)\b|.*can(not|'t) allocate memory", re.IGNORECASE)


def last_line(tail: bytes) -> str:
    """The last line that says something, of what a program wrote to its standard error."""
    lines = [line.strip() for line in re.split(r"[\r\n]", tail.decode(errors="replace"))]
    return next((line[:_LONGEST_LINE] for line in reversed(lines) if line), "")


def judged(status: int, said: str) -> tuple[Status, str] | None:
    """What a program that ended by itself came to; ``None`` if it ended well or a signal ended it.

    Args:
        status: as ``os.waitpid`` says it.
        said: its last line.
    """
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    if code == 0:
        return None
    return ("out-of-memory" if _OUT_OF_MEMORY.match(said) else "failed"), f"ended with exit code {code}"


def told_of(left: Sequence[str]) -> list[str]:
    """What is to be said of processes that outlived their program."""
    if not left:
        return []
    what = "a process" if len(left) == 1 else f"{len(left)} processes"
    return [f"{what} outlived the script and {'was' if len(left) == 1 else 'were'} killed: {', '.join(left)}"]
