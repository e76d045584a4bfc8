"""Code that comes out of the checkout although another commit is what is measured."""

from __future__ import annotations

import sys
from pathlib import Path

from membench.errors import MembenchError

ON_PATH = "put the folder that it is imported from on PYTHONPATH"


class ForeignCode(MembenchError):
    """What is measured is not of the version that it is measured for."""

    @classmethod
    def of(cls, what: str, other: Path, remedy: str = ON_PATH) -> ForeignCode:
        """``what``: 'module helpers', that lies in ``other``, the folder of the other version."""
        return cls(f"{what} would come out of {other} and not out of the other commit: {remedy}")


def refuse_imported(other: Path, own: Path) -> None:
    """Hold that nothing that this process has imported, by whatever way, is of the other version.

    An editable install may lead there by a finder of its own, and what a model imports may do so where it itself does
    not.

    Args:
        other: the folder of the version that is not measured; ``own``: of that which is.

    Raises:
        ForeignCode: if a module is.
    """
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and is_foreign(Path(file), other, own):
            raise ForeignCode.of(f"module '{name}'", other)


def is_foreign(file: Path, other: Path, own: Path) -> bool:
    """Whether a file lies in the other version's folder, and is no part of an environment that does, too."""
    if "site-packages" in file.parts:
        return False
    resolved = file.resolve()
    environments = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    installed = any(resolved.is_relative_to(folder) for folder in environments if folder != other)
    return resolved.is_relative_to(other) and not resolved.is_relative_to(own) and not installed
