"""Reading a suite file in TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from membench.errors import SuiteError


def read(path: Path) -> str:
    """Return the text of a suite file.

    Raises:
        SuiteError: if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SuiteError(
            f"{path}: not UTF-8, as TOML must be: byte 0x{error.object[error.start]:02x} in line {line}"
        ) from None


def parsed(path: Path, text: str) -> dict[str, Any]:
    """Return the tables of a suite file.

    Raises:
        SuiteError: if the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SuiteError(f"{path}: not valid TOML: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path}: not valid TOML: {error}") from None
    except ValueError:  # Python limits the digits of a number
        raise SuiteError(f"{path}: not valid TOML: a number has thousands of digits") from None
