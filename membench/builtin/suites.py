"""The suites that come with membench: each name of this module is the path of a file."""

from __future__ import annotations

from pathlib import Path

_BESIDE_PACKAGE = Path(__file__).parent.parent / "suites"
_IN_CHECKOUT = Path(__file__).parent.parent.parent / "suites"


def __getattr__(name: str) -> Path:
    if name.startswith("__"):
        raise AttributeError(name)
    folder = _BESIDE_PACKAGE if _BESIDE_PACKAGE.is_dir() else _IN_CHECKOUT
    return folder / f"{name.replace('_', '-')}.toml"
