"""A quality metric that a suite may ask for; those that every case has are taken in one pass of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from membench.plugins import Context, HeldOut, QualityMetric

if TYPE_CHECKING:
    from torch import nn


class NextTokenAccuracy(QualityMetric):
    """Share of held-out tokens that are the likeliest next one: of untrained models it is chance."""

    unit: ClassVar[str] = "%"
    better: ClassVar[Literal["lower", "higher"]] = "higher"

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        import torch

        right, count = 0, 0
        for piece in held_out.pieces:
            ids = torch.tensor(piece, dtype=torch.long, device=context.device)
            right += int((held_out.logits(ids[:-1]).argmax(-1) == ids[1:]).sum())
            count += len(ids) - 1
        return right / count * 100
