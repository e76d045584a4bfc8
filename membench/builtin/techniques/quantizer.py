"""What all weight quantizers share: which layers they take, and what they cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from membench.builtin.techniques.experts import remark_on_left
from membench.plugins import Context, LayerWise, Setting, Technique, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn

_Made = TypeVar("_Made")


_SMALL = 32  # divides the layers of every model that a case is rehearsed on


class WeightQuantizer(Technique):
    """Quantizes linear layers; embedding tables and the output head where asked to."""

    acts_on: ClassVar[str] = "weights"
    kind: ClassVar[str] = "integer"
    """What the weights become, as in 'int8 weights have no gradients'."""
    no_embeddings: ClassVar[str | None] = None
    """Why embedding tables cannot be quantized; ``None`` where they can."""
    no_gradients: ClassVar[str | None] = None
    """Why no gradient passes through a quantized layer, so that adapters below would not learn."""
    embeddings: bool = False
    head: bool = False

    def shares(self) -> tuple[str, int] | None:
        """The option, and its value, that says how many neighbours of a row share a scale; ``None``: all, or no row."""
        return None

    def check(self, setting: Setting) -> str | None:
        if self.embeddings and self.no_embeddings:
            return f"embeddings = true: {self.no_embeddings}"
        shape = setting.model.shape
        if shape and shape.tied and self.embeddings != self.head:
            if self.no_embeddings:
                return f"head = true: the output head of this model is its embedding table, and {self.no_embeddings}"
            return _ONE_TABLE
        if shape and (share := self.shares()) is not None:
            option, size = share
            wide = [width for width in (shape.width, shape.inner_width) if width % size]
            return f"{option} = {size} does not divide the width {wide[0]} of the model's layers" if wide else None
        return None

    def refuse(self, setting: Setting) -> str | None:
        if any(isinstance(technique, WeightQuantizer) for technique in setting.before):
            return "the weights are quantized already"
        if not setting.workload.trains:
            return None
        if any(getattr(technique, "trains_adapters", False) for technique in setting.after):
            return self.no_gradients
        return f"{self.kind} weights have no gradients: they cannot be trained"

    def remark(self, module: nn.Module, context: Context) -> str | None:
        return remark_on_left(module)

    def for_rehearsal(self, context: Context) -> Self:
        """This quantizer, with groups that fit the miniature where the case is rehearsed on one."""
        share = self.shares()
        if context.rehearsal and share is not None and share[1] != _SMALL:
            return self.model_copy(update={share[0]: _SMALL})
        return self

    def chosen(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Linear | nn.Embedding | None:
        """The layer, as one that libraries know, if it is to be quantized.

        Raises:
            Unsuitable: if its weight cannot be.
        """
        import torch
        from torch import nn

        if isinstance(layer, nn.Embedding):
            if head is not None and getattr(head, "weight", None) is layer.weight and self.embeddings != self.head:
                raise Unsuitable(_ONE_TABLE)
            if not self.embeddings:
                return None
        else:
            layer = as_linear(layer)
            if not isinstance(layer, nn.Linear) or (layer is head and not self.head):
                return None
        weight = layer._parameters.get("weight")
        if weight is None or weight.layout is not torch.strided or hasattr(weight.data, "__tensor_flatten__"):
            raise Unsuitable(f"'{name}' has no plain weight left that could be quantized")
        if (share := self.shares()) is not None and weight.shape[1] % share[1]:
            raise Unsuitable(f"{share[0]} = {share[1]} does not divide the {weight.shape[1]} columns of '{name}'")
        return layer


class LayerQuantizer(WeightQuantizer, LayerWise):
    """Quantizes each layer by itself, so that it can be streamed."""

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        chosen = self.chosen(name, layer, head)
        return layer if chosen is None else self.quantized(name, chosen)

    def quantized(self, name: str, layer: nn.Linear | nn.Embedding) -> nn.Module:
        """What takes the place of a layer that is to be quantized."""
        raise NotImplementedError


_ONE_TABLE = (
    "the output head of this model is its embedding table: quantize both (embeddings = true and head = true) or "
    "neither, or the table would be held twice"
)


def once(weight: torch.Tensor, make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes of a weight; the same object again for a second layer that shares the weight."""
    holder: Any = weight
    if not hasattr(holder, "quantized_to"):
        holder.quantized_to = make()
    return holder.quantized_to


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
