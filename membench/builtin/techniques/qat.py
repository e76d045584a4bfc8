"""Training that knows of the rounding to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.techniques.inner_training import tune
from membench.builtin.techniques.quantizer import WeightQuantizer
from membench.plugins import Context, output_head, replaced

if TYPE_CHECKING:
    from torch import nn


class QuantizationAwareTraining(WeightQuantizer):
    """Fine-tunes with weights rounded in each forward pass (torchao), then keeps the integers, packed without gaps.

    Gradients pass the rounding as if it were not there (Jacob et al., 2018, arXiv:1712.05877). s = max|x| /
    (2^(bits - 1) - 1/2) of each group of ``group_size`` neighbours, integers from -2^(bits - 1) to 2^(bits - 1) - 1.
    torchao keeps these in a byte each; here they are packed as round-to-nearest's are.

    More training may help by itself: ``fake_quantization = false`` trains as long without rounding and quantizes in the
    same way, and the difference between the two is what knowing of the rounding brings. ``embeddings`` and ``head``
    take in what is else left alone; they are trained in any case.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch", "torchao.quantization.qat", "membench.builtin.layers.packed")
    bits: int = Field(4, ge=2, le=8)
    group_size: int = Field(32, ge=2)
    steps: int = Field(200, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    fake_quantization: bool = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    def shares(self) -> tuple[str, int] | None:
        return "group_size", self.group_size

    def nominal_bits(self) -> float | None:
        return self.bits

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
        from torchao.quantization.qat import QATConfig

        quantizer, head = self.for_rehearsal(context), output_head(module)
        chosen: dict[str, nn.Module] = {}
        quantizer.check_patterns((name for name, layer in module.named_modules() if layer._parameters), context)
        for name, layer in list(module.named_modules()):
            if layer._parameters and (plain := quantizer.chosen(name, layer, head, context)) is not None:
                module = replaced(module, name, plain)
                chosen[name] = plain
        weights = {name: id(layer.weight) for name, layer in chosen.items()}  # before and after: shared ones are equal
        layers = set(chosen.values())
        integers = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{self.bits}"), granularity=PerGroup(quantizer.group_size)
        )
        if self.fake_quantization:
            quantize_(module, QATConfig(integers, step="prepare"), filter_fn=lambda layer, _: layer in layers)
            layers = {module.get_submodule(name) for name in chosen}
        chosen.clear()
        tune(module, context, self.steps, self.learning_rate)
        final = QATConfig(integers, step="convert") if self.fake_quantization else integers
        quantize_(module, final, filter_fn=lambda layer, _: layer in layers)
        layers.clear()
        return _packed(module, weights, self.bits)


def _packed(module: nn.Module, weights: dict[str, int], bits: int) -> nn.Module:
    """``module`` with the integers that torchao keeps in a byte each packed, once where layers share a weight.

    Args:
        weights: by layer, what tells its weight from others.
    """
    from torch import nn

    from membench.builtin.layers.packed import PackedEmbedding, PackedLinear, PackedWeight, runs_of_rows

    made: dict[int, PackedWeight] = {}
    for name, weight in weights.items():
        layer: Any = module.get_submodule(name)
        if weight not in made:
            integers = layer.weight.qdata
            made[weight] = PackedWeight(runs_of_rows(integers), integers.shape, layer.weight.scale, bits)
        packed = made[weight]
        is_table = isinstance(layer, nn.Embedding)
        module = replaced(module, name, PackedEmbedding(packed) if is_table else PackedLinear(packed, layer.bias))
    return module
