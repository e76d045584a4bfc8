"""Measure what memory-saving techniques for language models really save, and what they cost.

``load_suite`` reads a suite, ``run`` measures it, ``read_run`` reads what was kept. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from membench.session import run
    from membench.store import Run, read_run
    from membench.suite import Suite, load_suite

__all__ = ["Run", "Suite", "load_suite", "read_run", "run"]

_HOMES = {
    "Run": "membench.store",
    "read_run": "membench.store",
    "Suite": "membench.suite",
    "load_suite": "membench.suite",
    "run": "membench.session",
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that a worker does not carry the runner's modules.
    if name not in _HOMES:
        raise AttributeError(f"module 'membench' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
