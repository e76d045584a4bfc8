"""Weights as integers and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from membench.plugins import Context, Technique

if TYPE_CHECKING:
    from torch import nn


class Int8WeightOnly(Technique):
    """Linear weights as int8 with a scale a row, or a group (torchao); embeddings and output head are left alone."""

    imports = ("torch", "torchao.quantization")
    group_size: int | None = Field(None, ge=1)

    def refuse(self, workload: str, device: str) -> str | None:
        return "int8 weights have no gradients: they cannot be trained" if workload == "train" else None

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        from torch import nn
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

        _replace_conv1d(module)
        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
        head = find_head()
        quantize_(
            module,
            Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False),
            filter_fn=lambda child, _: isinstance(child, nn.Linear) and child is not head,
        )
        return module


def _replace_conv1d(module: nn.Module) -> None:
    """GPT-2 keeps its linear layers transposed in a class of its own, which torchao passes over without a word."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, child in list(module.named_children()):
        if isinstance(child, Conv1D):
            inputs, outputs = child.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight = nn.Parameter(child.weight.data.t().contiguous())
            linear.bias = child.bias
            setattr(module, name, linear)
        else:
            _replace_conv1d(child)
