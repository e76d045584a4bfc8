"""``python -m membench``: the command line."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _main() -> int:
    # Plug-ins, the built-in ones too, are found through the metadata of what is installed.
    try:
        importlib.metadata.version("membench")
    except importlib.metadata.PackageNotFoundError:
        return _not_ready(f"not installed in {sys.executable}")
    try:
        from membench.cli import main

        return main()
    except ModuleNotFoundError as error:
        is_ours = error.name is None or error.name.partition(".")[0] == "membench"
        if is_ours or not (_ROOT / "pyproject.toml").is_file():
            raise
        return _not_ready(f"its dependency '{error.name}' is missing in {sys.executable}")


def _not_ready(reason: str) -> int:
    """Print in one line what is wrong and what to do; return the exit code for bad input."""
    remedy = shlex.join([sys.executable, "-m", "pip", "install", "-e", str(_ROOT)])
    print(f"membench: {reason}: run {remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(_main())
