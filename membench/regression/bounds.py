"""What two figures prove against each other where of one of them only a bound is known."""

from __future__ import annotations

import math
from typing import Literal

Proven = Literal["worse", "better", "no worse"]
"""``no worse``: not by more than is allowed, and perhaps better."""


def proven(
    base: float, base_bound: str | None, new: float, new_bound: str | None, *, is_less_better: bool, allowed: float
) -> Proven | None:
    """What holds wherever within its bound each figure really lies; ``None``: nothing does.

    Args:
        base_bound, new_bound: ``at least``, ``at most``, or ``None`` of a figure that is exact.
        allowed: by how much the figure may get worse, in its unit.
    """
    least_base, most_base = _reach(base, base_bound)
    least_new, most_new = _reach(new, new_bound)
    if not is_less_better:
        least_base, most_base, least_new, most_new = -most_base, -least_base, -most_new, -least_new
    if least_new > most_base + allowed:
        return "worse"
    if most_new < least_base - allowed:
        return "better"
    return "no worse" if most_new <= least_base + allowed else None


def _reach(value: float, bound: str | None) -> tuple[float, float]:
    return (-math.inf if bound == "at most" else value, math.inf if bound == "at least" else value)
