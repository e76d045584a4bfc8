"""Strict parsing of JSON from files that may come from anyone: invalid JSON is refused, and opening never blocks."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import BinaryIO

from membench.errors import ResultsError
from membench.records.validation import shown


def open_file(path: Path) -> BinaryIO:
    """Open a regular file. Anything else is refused, since a pipe without a writer would block.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file")
    return file


def parsed(text: bytes) -> object:
    """Parse JSON.

    Raises:
        ResultsError: if the text is not JSON, or contains a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ResultsError("not JSON of membench: nested too deeply") from None
    except ValueError:
        raise ResultsError("not JSON") from None


def _refuse(constant: str) -> object:
    raise ResultsError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ResultsError(f"{shown(digits)} is more than a number holds")
    return number
