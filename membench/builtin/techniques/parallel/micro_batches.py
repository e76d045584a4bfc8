"""When gradients are exchanged between ranks, if a batch is accumulated from micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from membench.plugins import TrainingStep

if TYPE_CHECKING:
    import torch
    from torch import nn

GradientSync: TypeAlias = Literal["micro-batch", "step"]
"""After each micro-batch, or once a step, after the last; then gradients add up on each rank, whole, until then."""


def before_each(step: TrainingStep, call: Callable[[bool], None]) -> TrainingStep:
    """Call a function before each micro-batch of a step, with whether it is the last one."""
    left = 0

    def split(batch: torch.Tensor) -> Sequence[torch.Tensor]:
        nonlocal left
        parts = step.split(batch)
        left = len(parts)
        return parts

    def loss(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        call(left == 0)
        return step.loss(module, rows)

    return dataclasses.replace(step, split=split, loss=loss)
