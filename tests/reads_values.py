"""Techniques of membench that read values of tensors besides, as libraries do that pack weights themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.kv_cache import KvCacheInt8
from membench.builtin.techniques.optimizers import SgdMomentum
from membench.builtin.techniques.quantization import RoundToNearest
from membench.plugins import Context, Technique

if TYPE_CHECKING:
    import torch
    from torch import nn


class ReadsWeights(RoundToNearest):
    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        _read(layer.weight)
        return super().quantized(name, layer)


class ReadsWeightsToTrain(Technique):
    def nominal_bits(self) -> float | None:
        return 8

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        _read(next(module.parameters()))
        return module


class ReadsForOptimizer(SgdMomentum):
    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        _read(parameters[0])
        return super().make(parameters, learning_rate, context)


class ReadsForCache(KvCacheInt8):
    def generate_options(self, options: dict[str, Any], context: Context) -> dict[str, Any]:
        import torch

        _read(torch.zeros(1))
        return super().generate_options(options, context)


class ReadsAndNamesNothing(Technique):
    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        _read(next(module.parameters()))
        return module


def _read(tensor: torch.Tensor) -> None:
    tensor.detach().numpy().tobytes()


TECHNIQUES = {
    "reads-weights": ReadsWeights,
    "reads-weights-to-train": ReadsWeightsToTrain,
    "reads-for-optimizer": ReadsForOptimizer,
    "reads-for-cache": ReadsForCache,
    "reads-and-names-nothing": ReadsAndNamesNothing,
}
