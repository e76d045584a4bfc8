"""Whether a layer may be replaced, or its weight converted, without losing what the model does with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_PLAIN = (("transformers.models.falcon.modeling_falcon", "FalconLinear"),)
"""Subclasses by module and name whose forward is the product with the weight and no more, however it is written."""
_CALLED_FOR_ANYTHING = ("__call__", "__getattr__", "__getattribute__", "__setattr__")
_HARMLESS = ("reset_parameters", "extra_repr", "call_super_init", "dump_patches")
"""What a subclass may override and still be what it is derived from."""


@dataclass(frozen=True)
class WeightUse:
    """Who uses a layer's weight in a forward pass of the model, by what was seen in one; empty: nobody.

    Attributes:
        taken_by: the class of a module that takes ``layer.weight``, if only to ask for its type.
        computed_by: the class of a module that computes with it by itself, past the layer's forward.
        own_operation: what the layer's own forward does with it besides the product or look-up of its kind.
        table: the path of an embedding that shares the weight.
        unlike: the path of a layer that shares the weight and has a forward or hooks of its own.
    """

    taken_by: str = ""
    computed_by: str = ""
    own_operation: str = ""
    table: str = ""
    unlike: str = ""


@dataclass(frozen=True)
class LeftAlone:
    """A layer that a technique would have converted and must not.

    Attributes:
        technique: the technique, or a copy of it.
        path: of the layer in the model.
        reason: why it stays, in a few words.
    """

    technique: Any
    path: str
    reason: str


def numberless(path: str) -> str:
    """Return a path with ``*`` for each number in it: the layers of alike blocks have one name."""
    return _NUMBER.sub("*", path)


def use_of(path: str, uses: Mapping[str, WeightUse] | None) -> WeightUse | None:
    """Return who uses the weight of the layer at a path; ``None`` if it is not known.

    A layer that has no entry, because blocks were taken out and the others renumbered, is taken for one of its like.
    """
    if uses is None:
        return None
    if path in uses:
        return uses[path]
    alike = (use for known, use in uses.items() if numberless(known) == numberless(path))
    return max(alike, key=lambda use: (bool(use.computed_by), bool(use.taken_by)), default=WeightUse())


def reason_to_keep(layer: nn.Module, use: WeightUse | None, *, weight_only: bool = False) -> str | None:
    """Return why a layer must stay as it is, in a few words; ``None`` if it may be replaced.

    Args:
        use: who else uses its weight; ``None``: not known.
        weight_only: the layer keeps its forward and its hooks, and its weight alone becomes another kind of tensor.
    """
    own = next(_of_its_own(layer), None)
    if use is None:
        return own
    if use.computed_by or (use.taken_by and not weight_only):
        return f"its weight is read by {use.computed_by or use.taken_by}"
    if not weight_only:
        return own or (f"it shares its weight with {use.unlike}" if use.unlike else None)
    return f"its weight goes through {use.own_operation}" if use.own_operation else None


def is_plain_subclass(layer: nn.Module) -> bool:
    """Return whether a layer does what the class of torch's does that it is derived from, and is known to."""
    return (type(layer).__module__, type(layer).__name__) in _PLAIN


def reason_not_to_convert(layer: nn.Module, *, weight_only: bool = False) -> str | None:
    """Return why the weight of a linear layer or an embedding is none that could be converted; ``None`` if it could."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own"
    if str(weight.layout) != "torch.strided" or hasattr(weight.data, "__tensor_flatten__"):
        return f"its weight is a {type(weight.data).__name__}, {str(weight.layout).removeprefix('torch.')}"
    if not weight.is_floating_point():
        return f"its weight is in {str(weight.dtype).removeprefix('torch.')}"
    if getattr(layer, "max_norm", None) is not None:
        return "it rescales its rows (max_norm)"
    if not weight_only and ((layer._parameters.keys() - {"weight", "bias"}) or layer._buffers or layer._modules):
        return "it holds more than a weight and a bias"
    return None


def has_its_own(layer: nn.Module) -> bool:
    """Return whether a layer has a forward or hooks of its own."""
    return next(_of_its_own(layer), None) is not None


def _of_its_own(layer: nn.Module) -> Iterator[str]:
    """Yield what a layer does or holds besides what the class of torch's does that it is or is derived from."""
    kind = type(layer)
    if "forward" in vars(layer):
        yield "its forward was exchanged"
    line = kind.__mro__
    of_torch = (each for each in line if each.__module__.startswith("torch.nn.") and each.__name__ != "Module")
    base = next(of_torch, None)
    for owner in () if base is None or is_plain_subclass(layer) else line[: line.index(base)]:
        for name in vars(owner):
            known = name in ("weight", "bias") or (hasattr(base, name) and name not in _HARMLESS)
            if known and (not name.startswith("__") or name in _CALLED_FOR_ANYTHING):
                yield f"{kind.__name__} has a {name} of its own"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS):
        yield "it has hooks"
