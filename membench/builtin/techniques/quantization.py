"""Weights as integers and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.plugins import LayerWise, Setting

if TYPE_CHECKING:
    from torch import nn


class Int8WeightOnly(LayerWise):
    """Linear weights as int8 with a scale a row, or a group (torchao); embeddings and output head are left alone."""

    imports = ("torch", "torchao.quantization")
    acts_on: ClassVar[str] = "weights"
    group_size: int | None = Field(None, ge=1)

    def check(self, setting: Setting) -> str | None:
        return does_not_divide(self.group_size, setting)

    def refuse(self, setting: Setting) -> str | None:
        return "int8 weights have no gradients: they cannot be trained" if setting.workload.trains else None

    def nominal_bits(self) -> float | None:
        return 8

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        from torch import nn
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

        layer = as_linear(layer)
        if not isinstance(layer, nn.Linear) or layer is head:
            return layer
        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        quantize_(layer, Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False))
        return layer


def does_not_divide(group_size: int | None, setting: Setting) -> str | None:
    """What is wrong with a group size for the model's linear layers, whose inputs are as wide as it is inside."""
    shape = setting.model.shape
    if shape is None or group_size is None:
        return None
    wide = [width for width in (shape.width, shape.inner_width) if width % group_size]
    return f"group_size = {group_size} does not divide the width {wide[0]} of the model's layers" if wide else None


def as_linear(layer: nn.Module) -> nn.Module:
    """GPT-2 keeps its linear layers transposed in a class of its own, which libraries pass over without a word."""
    from torch import nn

    if type(layer).__name__ != "Conv1D":
        return layer
    transposed: Any = layer
    inputs, outputs = transposed.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(transposed.weight.data.t().contiguous())
    linear.bias = transposed.bias
    return linear
