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

_MOST_CAUSES, _LONGEST_CAUSE = 3, 300


def one_line(text: str) -> str:
    """Return the text with line breaks and terminal control characters written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place_in(error: BaseException, file: str) -> str:
    """Return ``', line 7'`` for the last line of a file in an error's traceback; empty if the file is not in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def is_rule(line: str) -> bool:
    """Whether a line is only drawn: it has no letter and no digit."""
    return not any(map(str.isalnum, line))


def summary(error: BaseException) -> str:
    """Summarize an error that is not membench's own in one line: its type and the first line that tells something."""
    try:
        lines = [line.strip() for line in str(error).splitlines()]
    except Exception:  # its own __str__ fails
        lines = []
    first = next((line for line in lines if not is_rule(line)), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def summary_with_causes(error: BaseException) -> str:
    """Summarize an error in one line, with what it was caused by, or what was being handled when it was raised."""
    said, seen = _summary_of_group(error), {id(error)}
    for _ in range(_MOST_CAUSES):
        cause = error.__cause__
        relation = "caused by" if cause is not None else "while handling"
        if cause is None and not error.__suppress_context__:
            cause = error.__context__
        if cause is None or id(cause) in seen:
            break
        seen.add(id(cause))
        said += f" ({relation} {_summary_of_group(cause)[:_LONGEST_CAUSE]})"
        error = cause
    return said


def _summary_of_group(error: BaseException, deep: int = 2) -> str:
    if not isinstance(error, BaseExceptionGroup) or not deep:
        return summary(error)
    said = (_summary_of_group(each, deep - 1) for each in error.exceptions[:_MOST_CAUSES])
    return f"{summary(error)}: {'; '.join(said)}"


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
