"""Experts of a mixture that lie stacked in one tensor, which libraries for linear layers pass over without a word."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from membench.units import format_bytes
from membench.worker.storages import Storages
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

_SMALLEST_SHARE = 0.005


def by_expert(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The stacked weights (experts, rows, columns) of a layer that takes one expert's matrix of them at a time.

    transformers says of its classes how experts are stacked; their own forward pass, ``eager``, goes expert by expert.
    Other classes may use a stack in any way, and have none here.
    """
    if not all(hasattr(layer, said) for said in ("config", "is_transposed", "has_gate")):
        return {}
    return {name: weight for name, weight in _stacked(layer).items() if name.endswith("_proj")}


def go_expert_by_expert(layer: nn.Module) -> None:
    """Let transformers run a layer's experts one after the other, and not all at once from the whole stack."""
    config: Any = layer.config
    config._experts_implementation = "eager"


def remark_on_left(module: nn.Module) -> str | None:
    """What a technique for linear layers has left of stacked weights, with its share if that is 0.5% or more."""
    left = [(type(layer).__name__, list(_stacked(layer).values())) for layer in module.modules() if _stacked(layer)]
    if not left:
        return None
    size_bytes = Storages(weight for _, weights in left for weight in weights).bytes
    share = size_bytes / weight_bytes(module)
    if share < _SMALLEST_SHARE:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in left).items())
    return (
        f"left {kinds} as they are, whose weights are stacked in one tensor: {format_bytes(size_bytes)},"
        f" {share:.0%} of the weights' bytes"
    )


def _stacked(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Plain matrices that are stacked in one parameter; kernels of convolutions have as many dimensions."""
    if "conv" in type(layer).__name__.lower():
        return {}
    return {
        name: weight
        for name, weight in layer._parameters.items()
        if weight is not None
        and weight.ndim == 3
        and min(weight.shape) > 1
        and weight.is_floating_point()
        and not hasattr(weight.data, "__tensor_flatten__")
    }
