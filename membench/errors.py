"""Errors for the user, their exit codes, and helpers for their messages."""

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
    """Return the text with line breaks and terminal control characters written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place_in(error: BaseException, file: str) -> str:
    """Return ``', line 7'`` for the last line of a file in an error's traceback; empty if the file is not in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def summary(error: BaseException) -> str:
    """Summarize an error that is not membench's own in one line: its type and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; libraries share no common type for that."""
    text = str(error).lower()
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or "can't allocate memory" in text or "cannot allocate memory" in text


class MembenchError(Exception):
    """An error that the user can fix. Its message is one line; ``exit_code`` is the exit code of the command."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class SuiteError(MembenchError):
    """An invalid suite."""


class PluginError(MembenchError):
    """A plug-in that is missing, broken or violates its contract."""


class ResultsError(MembenchError):
    """A results file that cannot be read or written."""


class RuleError(MembenchError):
    """An invalid tolerance or gate."""


class UnknownMetric(RuleError):
    """A tolerance for an unknown metric; a custom metric may become known once its suite is loaded."""


class CannotCompare(MembenchError):
    """Two measurements that cannot be compared: no case in common, or no baseline of this machine."""

    exit_code = EXIT_CANNOT_COMPARE


_MOST_NAMES = 10
_LONGEST_NAME = 80  # the time to compare names grows with the square of their length


def nearest(wrong: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """Return the known name closest to a misspelled one, ignoring case; ``None`` if none is close enough.

    Args:
        alike: the smallest accepted similarity, from 0 to 1.
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wrong[:_LONGEST_NAME].lower(), sorted(by_lower), n=1, cutoff=alike)
    return by_lower[near[0]] if near else None


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelled name: the closest known name, else all known names, or the ten closest of many."""
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
