"""Prefill: one pass over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from membench.plugins import Context, Step, Technique, Tokens, Workload, keeping_parts, own_rows, stepping

if TYPE_CHECKING:
    from torch import nn


class Forward(Workload):
    """One forward pass (prefill) over batch × sequence tokens, without gradients."""

    batch_size: int = Field(1, ge=1, le=65_536)
    sequence_length: int = Field(256, ge=1, le=1_048_576)

    def longest_sequence(self) -> int:
        return self.sequence_length

    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        batch = tokens(self.tokens_per_step()).view(self.batch_size, self.sequence_length)
        batch = own_rows(batch, techniques, context).to(context.device)

        def step() -> None:
            with torch.no_grad(), stepping(techniques, context), keeping_parts(techniques):
                module(batch)

        return step
