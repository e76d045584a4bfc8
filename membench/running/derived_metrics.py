"""Derived metrics: each with its source, or with the reason why it is unknown."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

_PAGES_IN_A_BATCH = 32


def resolution_bytes() -> int:
    """Return the error of the kernel's peak in bytes.

    Each core counts up to a batch of pages locally before it adds them to the process's counter.
    """
    cores = os.cpu_count() or 1
    return max(_PAGES_IN_A_BATCH, 2 * cores) * cores * os.sysconf("SC_PAGE_SIZE")


@dataclass
class DerivedMetrics:
    """The ``metrics``, ``reasons`` and ``obtained`` of a ``Record``, by metric field, and what they lead to say."""

    metrics: dict[str, float | int | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    obtained: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, value: float | int, source: str, bound: str = "exact", **how: Any) -> None:
        """Add a value, its source and its bound."""
        self.metrics[name] = value
        self.obtained[name] = {"source": source, "bound": bound, **how}

    def add_unknown(self, name: str, reason: str) -> None:
        """Add a metric that is unknown, and the reason."""
        self.metrics[name] = None
        self.obtained.pop(name, None)
        self.reasons[name] = reason
