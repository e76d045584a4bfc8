"""A tiny generic model for rehearsing cases whose own model has no miniature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class RehearsalModel(Model):
    """An embedding and two linear layers: token ids (B, T) to logits (B, T, 256)."""

    def build(self, context: Context) -> nn.Module:
        return self._layers().to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self._layers()

    def _layers(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 64), nn.Linear(64, 256))

    def vocabulary(self, module: nn.Module) -> int:
        return 256
