"""Refuse modules of the wrong version when two checkouts are measured."""

from __future__ import annotations

import sys
from pathlib import Path

from membench.errors import MembenchError

ON_PATH = "put the folder that it is imported from on PYTHONPATH"


class ForeignCode(MembenchError):
    """Code that belongs to another version than the one that is measured."""

    @classmethod
    def of(cls, what: str, other: Path, remedy: str = ON_PATH) -> ForeignCode:
        """Make the error for ``what``, such as 'module helpers', which lies in the other version's folder."""
        return cls(f"{what} would come out of {other} and not out of the other commit: {remedy}")


def refuse_imported(other: Path, own: Path) -> None:
    """Check that no module that this process has imported belongs to the other version.

    The import path alone does not ensure that: an editable install has a finder of its own.

    Args:
        other: the folder of the version that is not measured.
        own: that of the version that is.

    Raises:
        ForeignCode: if a module does.
    """
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and is_foreign(Path(file), other, own):
            raise ForeignCode.of(f"module '{name}'", other)


def is_foreign(file: Path, other: Path, own: Path) -> bool:
    """Return whether a file belongs to the other version, and not to an environment that lies in its folder."""
    if "site-packages" in file.parts:
        return False
    resolved = file.resolve()
    environments = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    installed = any(resolved.is_relative_to(folder) for folder in environments if folder != other)
    return resolved.is_relative_to(other) and not resolved.is_relative_to(own) and not installed
