"""Measure what memory-saving techniques for language models really save, and what they cost.

``load_suite`` reads a suite from a file and ``Suite`` makes one in Python; ``run`` measures it; ``read_run`` reads the
results. ``phase`` marks a phase in a user's own program. Errors that the user can fix are raised as a ``MembenchError``
with a message of one line. Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from membench.errors import MembenchError, PluginError, ResultsError, SuiteError
    from membench.estimating.estimate import estimate
    from membench.estimating.fit import Fit, fit
    from membench.protocol.marks import phase
    from membench.records.record import Record
    from membench.records.run_file import Run, newest_run, read_run
    from membench.running.session import resumable, run
    from membench.suite.loading import load_suite
    from membench.suite.suite import Suite

__all__ = [
    "Fit",
    "MembenchError",
    "PluginError",
    "Record",
    "ResultsError",
    "Run",
    "Suite",
    "SuiteError",
    "estimate",
    "fit",
    "load_suite",
    "newest_run",
    "phase",
    "read_run",
    "resumable",
    "run",
]

_MODULES = {
    "MembenchError": "membench.errors",
    "PluginError": "membench.errors",
    "ResultsError": "membench.errors",
    "SuiteError": "membench.errors",
    "phase": "membench.protocol.marks",
    "Record": "membench.records.record",
    "Run": "membench.records.run_file",
    "newest_run": "membench.records.run_file",
    "read_run": "membench.records.run_file",
    "estimate": "membench.estimating.estimate",
    "Fit": "membench.estimating.fit",
    "fit": "membench.estimating.fit",
    "Suite": "membench.suite.suite",
    "load_suite": "membench.suite.loading",
    "resumable": "membench.running.session",
    "run": "membench.running.session",
}


def __getattr__(name: str) -> Any:
    # Modules are loaded on first use, so that a worker does not load the runner's modules.
    if name not in _MODULES:
        raise AttributeError(f"module 'membench' has no attribute '{name}'")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found
