"""The reference."""

from __future__ import annotations

from membench.plugins import Technique


class NoTechnique(Technique):
    """Nothing: the model as it is built, in fp32. Every ratio is against it."""
