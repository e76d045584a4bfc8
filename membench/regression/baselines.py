"""Baselines on disk: small JSON files that can be reviewed in a diff."""

from __future__ import annotations

from pathlib import Path

from membench.regression.measured import Measured

SCHEMA_VERSION = 1
"""History: 1, the first."""

FOLDER = Path("results") / "baselines"


def default_name(measured: Measured) -> str:
    """``SUITE@MACHINE-CLASS``."""
    raise NotImplementedError


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """Where a baseline of this name lies: ``FOLDER/NAME.json``.

    Raises:
        ResultsError: if it is no name: letters, digits, '.', '_', '-' and one '@', and nothing that leads elsewhere.
    """
    raise NotImplementedError


def write(measured: Measured, path: Path) -> None:
    """Keep a measurement as a baseline, whole or not at all.

    Raises:
        ResultsError: if it cannot be written, or no case of it ended well.
    """
    raise NotImplementedError


def read(path: Path) -> Measured:
    """Read a baseline.

    Raises:
        ResultsError: in one line, if it is none, is damaged or of a newer schema.
    """
    raise NotImplementedError


def names(folder: Path = FOLDER) -> list[str]:
    """The baselines that lie in a folder."""
    raise NotImplementedError


def remove(name: str, folder: Path = FOLDER) -> None:
    """Remove a baseline.

    Raises:
        ResultsError: if there is none of this name.
    """
    raise NotImplementedError
