"""bitsandbytes' 4-bit layer, so that its state dict is right at any time and can be loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from torch import nn


class Nf4Linear(Linear4bit):
    """A linear layer of 4-bit weights.

    On a CPU with AVX512-BF16, bitsandbytes packs a layer anew in its first pass outside training, with scales in bf16,
    and undoes that for a state dict; where the scales are not quantized it then leaves them transposed, in the state
    dict and in the layer.
    """

    @classmethod
    def of(cls, layer: nn.Linear, block_size: int, double_quantization: bool) -> Self:
        """A layer quantized, on its own device."""
        made = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compress_statistics=double_quantization,
            quant_type="nf4",
            device="meta",
        )
        weight: Any = Params4bit(
            layer.weight.data,
            requires_grad=False,
            blocksize=block_size,
            compress_statistics=double_quantization,
            quant_type="nf4",
            module=made,
        )
        made.weight, made.bias = weight.to(layer.weight.device), layer.bias
        # It packs 32 rows together, and fails where some are left over.
        made.support_avx512bf16_for_cpu = made.support_avx512bf16_for_cpu and layer.out_features % 32 == 0
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; the kernel for CPUs reads inputs that are a transposed view as if they were none."""
        return super().forward(x.contiguous())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight: Any = self.weight
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
            state.absmax = state.absmax.T.flatten().float()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        weight = f"{prefix}weight"
        statistics = {key: value for key, value in state_dict.items() if key.startswith(f"{weight}.")}
        codes = state_dict[weight]
        self.weight = Params4bit.from_prequantized(codes, dict(statistics), device=codes.device, module=self)
        others = {key: value for key, value in state_dict.items() if key != weight and key not in statistics}
        super()._load_from_state_dict(others, prefix, *rest)
        missing: list[str] = rest[2]
        missing.remove(weight)
