"""The errors a user can meet, and the exit codes they lead to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_CASES_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class MembenchError(Exception):
    """A message meant for the user, in one line, with the exit code it leads to."""

    exit_code = EXIT_BAD_INPUT


class SuiteError(MembenchError):
    """A suite that cannot be run as it is written."""


class PluginError(MembenchError):
    """A plug-in that cannot be found or does not keep its contract."""


class ResultsError(MembenchError):
    """A results file that cannot be read or continued."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else all that are known."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.55)
    if near:
        return f"did you mean '{near[0]}'?"
    return "known: " + ", ".join(names) if names else "none is known"
