"""Where a change comes from: phase, part of the step, category, modules."""

from __future__ import annotations

from dataclasses import dataclass

from membench.record import Metric
from membench.regression.measured import MeasuredCase


@dataclass(frozen=True)
class Cause:
    """A share of a change.

    Attributes:
        amount: in the metric's unit, signed.
        what: a category (``weights``, ``gradients``, ``optimizer``, ``activations``, ``cache``, ``other``), a module's
            name, or for time a part of the step.
        kind: which of the three.
        phase: in which it shows, if it is known; ``part`` of the step likewise.
    """

    amount: float
    what: str
    kind: str
    phase: str | None = None
    part: str | None = None


def causes(metric: Metric, base: MeasuredCase, new: MeasuredCase) -> tuple[Cause, ...]:
    """What a metric's change is made of, the largest first; empty where the records do not tell."""
    raise NotImplementedError
