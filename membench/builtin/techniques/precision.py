"""Weights in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.plugins import Context, Technique

if TYPE_CHECKING:
    from torch import nn


class Bf16(Technique):
    """Weights and activations in bfloat16: 2 bytes a weight, fp32's range, 8 bits of precision."""

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        return module.to(torch.bfloat16)


class Fp16(Technique):
    """Weights and activations in float16: 2 bytes a weight, 11 bits of precision, overflows above 65,504."""

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        return module.to(torch.float16)
