"""Weights in half precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from membench.plugins import LayerWise

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Cast(LayerWise):
    """Casts each layer's own parameters and buffers; buffers of layers without parameters (rotary angles) stay fp32."""

    acts_on: ClassVar[str] = "weights, activations"

    def nominal_bits(self) -> float | None:
        return 16

    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        dtype = self.dtype()
        return layer._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)


class Bf16(_Cast):
    """Weights and activations in bfloat16: 2 bytes a weight, fp32's range, 8 bits of precision."""

    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16


class Fp16(_Cast):
    """Weights and activations in float16: 2 bytes a weight, 11 bits of precision, overflows above 65,504."""

    def dtype(self) -> torch.dtype:
        import torch

        return torch.float16
