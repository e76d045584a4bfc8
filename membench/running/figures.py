"""Metrics as they are worked out: each with how it was obtained, or the reason why it is not known."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

_PAGES_IN_A_BATCH = 32


def resolution_bytes() -> int:
    """How far off the kernel's peak may be: each core counts up to a batch of pages by itself before it adds them."""
    cores = os.cpu_count() or 1
    return max(_PAGES_IN_A_BATCH, 2 * cores) * cores * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Figures:
    """What ``Record`` keeps as ``metrics``, ``reasons`` and ``obtained``; all by metric field."""

    metrics: dict[str, float | int | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    obtained: dict[str, dict[str, Any]] = field(default_factory=dict)

    def know(self, name: str, value: float | int, source: str, bound: str = "exact", **how: Any) -> None:
        self.metrics[name] = value
        self.obtained[name] = {"source": source, "bound": bound, **how}

    def miss(self, name: str, reason: str) -> None:
        self.metrics[name] = None
        self.reasons[name] = reason
