from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from membench.plugins import Context, HeldOut, QualityMetric

if TYPE_CHECKING:
    from torch import nn


class MeanEntropy(QualityMetric):
    """How undecided the model is about the next token, over the first piece of the text."""

    contract: ClassVar[int] = 1
    unit: ClassVar[str] = "nats"

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        import torch

        shares = held_out.logits(torch.tensor(held_out.pieces[0], device=context.device)).float().log_softmax(-1)
        return -(shares.exp() * shares).sum(-1).mean().item()
