"""The base classes of techniques that convert a model layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from membench.plugins.contract import Context, Technique
from membench.plugins.options import NotInModel, Unsuitable, given_back
from membench.plugins.replacing import LeftAlone, numberless, reason_to_keep, use_of

if TYPE_CHECKING:
    from torch import nn

_MOST_NAMES = 12


class SelectsLayers(Technique):
    """A technique that converts layers, of which options leave some out.

    ``skip`` and ``only`` are patterns of paths of layers in the model (``*``, ``?``, ``[…]``); a pattern that matches a
    module stands for all layers in it: ``skip = ["lm_head", "model.layers.0", "*.out_proj"]``.
    """

    keeps_layers: ClassVar[bool] = False
    """Whether layers keep class, hooks and plain tensors, so that it does not matter who reads their weights."""
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def selects(self, name: str) -> bool:
        """Return whether the options leave the layer at a path to this technique."""
        chosen = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return chosen and not any(_matches(name, pattern) for pattern in self.skip)

    def check_patterns(self, names: Iterable[str], context: Context) -> None:
        """Check that each pattern matches a layer. A rehearsal's miniature has other layers.

        Raises:
            NotInModel: if one matches none.
        """
        if context.rehearsal or not (self.skip or self.only):
            return
        known = list(names)
        for option, patterns in (("skip", self.skip), ("only", self.only)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in known):
                    raise NotInModel(f"{option} = ['{pattern}'] matches no layer; there are {_listed(known)}")


class LayerWise(SelectsLayers):
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

    def converted(self, name: str, layer: nn.Module, head: nn.Module | None, context: Context) -> nn.Module:
        """Return what takes the place of ``layer``: what ``convert`` makes of it, or the layer if it must stay.

        It must stay if its replacement would lose its own forward or hooks, or if others read its weight. A layer that
        the replacement contains keeps both. Override it to ask before anything is converted.
        """
        if not self.selects(name):
            return layer
        use = use_of(name, context.weight_uses)
        replaced_whole = reason_to_keep(layer, use)
        replaced_weight = reason_to_keep(layer, use, weight_only=True)
        had_plain_weight = _has_plain_weight(layer)
        before = {} if replaced_whole is None and replaced_weight is None else _own_state(layer)
        made = given_back(self.convert(name, layer, head), self, "convert", "layer")
        reason = None
        if all(child is not layer for child in made.modules()):
            reason = replaced_whole
        elif had_plain_weight and not _has_plain_weight(layer):
            reason = replaced_weight
        if reason is None:
            return made
        vars(layer).update(before)
        context.left_alone.append(LeftAlone(self, name, reason))
        return layer

    def for_rehearsal(self, context: Context) -> Self:
        """Return this technique, or in a rehearsal one of the same kind whose options fit the miniature."""
        return self

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        head, technique = output_head(module), self.for_rehearsal(context)
        names = [name for name, child in module.named_modules() if child._parameters]
        technique.check_patterns(names, context)
        for name in names:
            layer = module.get_submodule(name)
            module = replaced(module, name, technique.converted(name, layer, head, context))
        return module


def output_head(module: nn.Module) -> nn.Module | None:
    """Return the layer that computes the logits, if the module names it."""
    found: nn.Module | None = getattr(module, "get_output_embeddings", lambda: None)()
    return found


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return ``module`` with the layer at a path replaced, wherever it is used; the layer itself if it is the root.

    Raises:
        Unsuitable: if a forward or hooks of the old layer's own would be lost. Ask ``reason_to_keep`` before.
    """
    if not name:
        return layer
    old = module.get_submodule(name)
    if old is not layer:
        inside = set(layer.modules())
        if old not in inside and (reason := reason_to_keep(old, None)) is not None:
            raise Unsuitable(f"'{name}' cannot be replaced without loss: {reason}")
        for parent in [child for child in module.modules() if child not in inside]:
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = layer
    return module


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a path or that of a module around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def _listed(names: Iterable[str]) -> str:
    """Return names for a message, those of alike blocks as one."""
    listed = list(dict.fromkeys(numberless(name) or "the model itself" for name in names))
    rest = [f"{len(listed) - _MOST_NAMES} more"] if len(listed) > _MOST_NAMES else []
    return ", ".join([*listed[:_MOST_NAMES], *rest])


def _has_plain_weight(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and not hasattr(weight.data, "__tensor_flatten__")


def _own_state(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's attributes, with copies of its dicts of parameters, buffers, children and hooks."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(layer).items()}
