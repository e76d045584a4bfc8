"""The errors a user can meet, and the exit codes they lead to."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

EXIT_OK = 0
EXIT_CASES_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_CANNOT_COMPARE = 3
EXIT_INTERRUPTED = 130


def one_line(text: str) -> str:
    """``text`` with what would break a line or steer a terminal written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place_in(error: BaseException, file: str) -> str:
    """``', line 7'``: the last line of a file that an error came through; nothing if it came through none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def summary(error: BaseException) -> str:
    """What somebody else's error says, in one line: its type and its message's first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether somebody else's error says that memory ran out; libraries have no type for it in common."""
    text = str(error).lower()
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or "can't allocate memory" in text or "cannot allocate memory" in text


class MembenchError(Exception):
    """A message meant for the user, always one line, with the exit code it leads to."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class SuiteError(MembenchError):
    """A suite that cannot be run as it is written."""


class PluginError(MembenchError):
    """A plug-in that cannot be found or does not keep its contract."""


class ResultsError(MembenchError):
    """A results file that cannot be read or continued."""


class RuleError(MembenchError):
    """A tolerance or a gate that cannot be understood."""


class UnknownMetric(RuleError):
    """A tolerance of a metric that nobody has; one of a plug-in may be known later."""


class CannotCompare(MembenchError):
    """Two measurements that say nothing about each other: no case in common, no baseline of this machine."""

    exit_code = EXIT_CANNOT_COMPARE


_MOST_NAMES = 10
_LONGEST_NAME = 80  # comparing takes time by the square of it


def nearest(wrong: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The known name that a misspelt one was probably meant to be, whatever its case.

    Args:
        alike: what share of both must be the same.
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong[:_LONGEST_NAME].lower(), sorted(by_lower), n=1, cutoff=alike)
    return by_lower[near[0]] if near else None


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else those that are known, the ten nearest of many."""
    names = sorted(set(known))
    near = nearest(wrong, names)
    if near is not None:
        return f"did you mean '{near}'?"
    if not names:
        return "none is known"
    if len(names) <= _MOST_NAMES:
        return "known: " + ", ".join(names)
    some = difflib.get_close_matches(wrong[:_LONGEST_NAME], names, n=_MOST_NAMES, cutoff=0)
    return f"known, among {len(names)}: " + ", ".join(sorted(some))
