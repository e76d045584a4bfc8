"""A tiny generic model for rehearsing cases whose own model has no miniature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class RehearsalModel(Model):
    """A decoder of two layers: token ids (B, T) to logits (B, T, 256)."""

    def build(self, context: Context) -> nn.Module:
        return self._layers().to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self._layers()

    def _layers(self) -> nn.Module:
        from membench.worker.decoder import Decoder

        return Decoder(width=64, layers=2, heads=4, inner_width=64, vocabulary=256)

    def vocabulary(self, module: nn.Module) -> int:
        return 256
