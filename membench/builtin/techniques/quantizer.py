"""What all weight quantizers share: which layers they take, and what they cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from membench.builtin.techniques.experts import remark_on_left
from membench.builtin.techniques.pruning import is_transposed
from membench.plugins import Context, LayerWise, SelectsLayers, Setting, Unsuitable
from membench.plugins.replacing import LeftAlone, is_plain_subclass, reason_not_to_convert, reason_to_keep, use_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_Made = TypeVar("_Made")


_SMALL = 32  # divides the layers of every model that a case is rehearsed on


class WeightQuantizer(SelectsLayers):
    """Quantizes linear layers; embedding tables and the output head where asked to."""

    acts_on: ClassVar[str] = "weights"
    kind: ClassVar[str] = "integer"
    """What the weights become, as in 'int8 weights have no gradients'."""
    no_embeddings: ClassVar[str | None] = None
    """Why embedding tables cannot be quantized; ``None`` where they can."""
    no_gradients: ClassVar[str | None] = None
    """Why no gradient passes through a quantized layer, so that adapters below would not learn."""
    weight_only: ClassVar[bool] = False
    """Whether the layer stays, with its forward and hooks, and its weight alone is exchanged."""
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

    def chosen(
        self, name: str, layer: nn.Module, head: nn.Module | None, context: Context
    ) -> nn.Linear | nn.Embedding | None:
        """The layer, as one that libraries know, if it is to be quantized.

        One that would be, had it not something of its own to lose, is added to the context's ``left_alone``.

        Raises:
            Unsuitable: if its weight cannot be.
        """
        if not self.selects(name) or not self._takes(layer, head):
            return None
        weight_only = self.weight_only and not (is_transposed(layer) or is_plain_subclass(layer))
        use = use_of(name, context.weight_uses)
        reason = reason_to_keep(layer, use, weight_only=weight_only)
        if use is not None and use.table and head is None and not self.embeddings:
            reason = reason or f"it shares its weight with {use.table}"
        if (reason := reason or reason_not_to_convert(layer, weight_only=weight_only)) is not None:
            context.left_alone.append(LeftAlone(self, name, reason))
            return None
        taken: Any = as_linear(layer)
        if (share := self.shares()) is not None and taken.weight.shape[1] % share[1]:
            raise Unsuitable(
                f"{share[0]} = {share[1]} does not divide the {taken.weight.shape[1]} columns of '{name}'; "
                f'leave it out with skip = ["{name}"]'
            )
        return taken

    def _takes(self, layer: nn.Module, head: nn.Module | None) -> bool:
        from torch import nn

        if not isinstance(layer, nn.Embedding):
            return (isinstance(layer, nn.Linear) or is_transposed(layer)) and (layer is not head or self.head)
        if head is not None and getattr(head, "weight", None) is layer.weight and self.embeddings != self.head:
            raise Unsuitable(_ONE_TABLE)
        return self.embeddings


class LayerQuantizer(WeightQuantizer, LayerWise):
    """Quantizes each layer by itself, so that it can be streamed."""

    def converted(self, name: str, layer: nn.Module, head: nn.Module | None, context: Context) -> nn.Module:
        chosen = self.chosen(name, layer, head, context)
        return layer if chosen is None else self.quantized(name, chosen)

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        linear: Any = as_linear(layer)
        return self.quantized(name, linear)

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
    """A layer as torch's linear one, which libraries know; they pass over those of GPT-2 and Falcon without a word."""
    from torch import nn

    if is_plain_subclass(layer):
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")  # type: ignore[arg-type]
        plain.weight, plain.bias = layer.weight, layer.bias  # type: ignore[assignment]
        return plain
    if not is_transposed(layer):
        return layer
    transposed: Any = layer
    inputs, outputs = transposed.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(transposed.weight.data.t().contiguous())
    linear.bias = transposed.bias
    return linear
