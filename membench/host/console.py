"""The frame of every membench program: encodings, signals, and exit codes for errors."""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from membench.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, MembenchError, one_line

# Replacements for signs in our own output that the encoding lacks.
_PLAIN = {
    "×": "x", "·": "|", "–": "-", "±": "+-", "µ": "u", "…": "...", "●": "*", "○": "o", "━": "=", "─": "-",
    "≤": "<=", "≥": ">=", "≈": "about ", "→": "->",
}  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a CI service that reads a log takes for a command: '::error::' at the beginning of a line, '##[error]' anywhere.
_COMMAND = re.compile(r"^([ \t]*):(?=:)|#(?=#\w*\[)", re.MULTILINE)
# Tabs and the line ends of CSV are neither.
_UNSAFE = re.compile(r"[^\n\t\r]+|\r(?!\n)")


def as_escape(sign: str) -> str:
    """Write a sign by its number, as texts for people have it."""
    return rf"\x{ord(sign):02x}"


def without_commands(text: str, coded: Callable[[str], str] = as_escape) -> str:
    """Return a text in which a CI service that reads the log finds no command.

    Args:
        coded: writes a sign in another way, which the text's format shows as that sign.
    """
    return _COMMAND.sub(lambda found: (found[1] or "") + coded(found[0][-1]), text)


def harmless(text: str, coded: Callable[[str], str] = as_escape) -> str:
    """Return a text of several lines in which neither a terminal nor a CI service finds a command."""
    return without_commands(_UNSAFE.sub(lambda found: one_line(found[0]), text), coded)


def put(text: str = "", *, file: TextIO | None = None, coded: Callable[[str], str] = as_escape) -> None:
    """Print a text with names and messages that others wrote: in records, files, plug-ins and workers.

    Every verb prints by this function alone.
    """
    print(harmless(text, coded), file=file or sys.stdout)


def put_workflow_command(line: str) -> None:
    """Print a command for GitHub Actions that membench gives itself; whatever is in it is escaped already.

    GitHub reads standard error too, and a program may read standard output.
    """
    print(line, file=sys.stderr)


def main(do: Callable[[], int]) -> int:
    """Do a program's work and return its exit code: that of ``do``, of a ``MembenchError``, or 130 if interrupted."""
    # A stream that was closed before the start is None: discard what is written to it.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, open as long as the program runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    codecs.register_error("membench-plain", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="membench-plain")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = do()
        sys.stdout.flush()
    except MembenchError as error:
        put(f"membench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("membench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has left; what was measured is kept.
        _write_to_nothing()
        return EXIT_OK
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _write_to_nothing()
        print(f"membench: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return code


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _write_to_nothing() -> None:
    """Discard output that is still to be flushed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end
