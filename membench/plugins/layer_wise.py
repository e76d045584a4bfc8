"""The base class of techniques that convert a model layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from membench.plugins.contract import Context, Technique
from membench.plugins.options import given_back

if TYPE_CHECKING:
    from torch import nn


class LayerWise(Technique):
    """A technique that converts layer by layer, so that a model can be streamed from a checkpoint."""

    required: ClassVar[frozenset[str]] = frozenset({"convert"})

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        """Return the replacement of ``layer``, or ``layer`` itself, changed or unchanged.

        Args:
            name: its path in the model.
            layer: a module that owns parameters directly; its children must not be changed.
            head: the model's output head, if it has one: some techniques leave it unchanged.
        """
        raise NotImplementedError

    def for_rehearsal(self, context: Context) -> Self:
        """Return this technique, or in a rehearsal one of the same kind whose options fit the miniature."""
        return self

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        head, technique = output_head(module), self.for_rehearsal(context)
        for name, layer in [(n, child) for n, child in module.named_modules() if child._parameters]:
            converted = given_back(technique.convert(name, layer, head), self, "convert", "layer")
            module = replaced(module, name, converted)
        return module


def output_head(module: nn.Module) -> nn.Module | None:
    """Return the layer that computes the logits, if the module names it."""
    found: nn.Module | None = getattr(module, "get_output_embeddings", lambda: None)()
    return found


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return ``module`` with the layer at a path replaced; the layer itself if the path is the root's."""
    if not name:
        return layer
    where, _, last = name.rpartition(".")
    if getattr(module.get_submodule(where), last) is not layer:
        setattr(module.get_submodule(where), last, layer)
    return module
