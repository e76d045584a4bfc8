"""The frame of every membench program: encodings, signals, and exit codes for errors."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from membench.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, MembenchError

# Replacements for signs in our own output that the encoding lacks.
_PLAIN = {"×": "x", "·": "|", "–": "-", "±": "+-", "µ": "u", "…": "...", "●": "*", "━": "=", "─": "-"}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        print(f"membench: {error}", file=sys.stderr)
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
