"""Layers that are alike, converted once on fake tensors: quantizing one may take a hundred thousand operations."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from membench.plugins import Technique
from membench.plugins.layer_wise import LayerWise
from membench.plugins.replacing import numberless
from membench.worker.tracing.ledger import Ledger

Convert = Callable[..., nn.Module]


@contextlib.contextmanager
def converted_once(techniques: Sequence[Technique], ledger: Ledger) -> Iterator[None]:
    """Let techniques that convert layer by layer convert the first of those that are alike, and copy it for the others.

    What converting holds beside the model is counted again for each of them.
    """
    kinds: dict[type[Any], Convert] = {
        type(each): type(each).converted for each in techniques if isinstance(each, LayerWise)
    }
    for kind, convert in kinds.items():
        kind.converted = _once(convert, ledger)
    try:
        yield
    finally:
        for kind, convert in kinds.items():
            kind.converted = convert


def _once(convert: Convert, ledger: Ledger) -> Convert:
    made: dict[Any, tuple[nn.Module, int]] = {}

    @functools.wraps(convert)
    def converted(self: Any, name: str, layer: nn.Module, head: nn.Module | None, context: Any) -> nn.Module:
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        shapes = tuple((key, each.shape, each.stride(), each.dtype, each.requires_grad) for key, each in tensors)
        key = id(self), numberless(name), type(layer), layer is head, shapes
        if key in made:
            first, taken_bytes = made[key]
            ledger.count_for_a_moment(taken_bytes)
            return copy.deepcopy(first, {id(each): _copied(each) for each in _own(first)})
        held = ledger.live_bytes
        with ledger.span() as converting:
            found = convert(self, name, layer, head, context)
        taken_bytes = converting.whole.bytes - held
        ledger.count_for_a_moment(converting.whole.bytes - ledger.live_bytes)
        # One whose weight alone is replaced; a layer of another class may be known by its identity.
        if found is layer and {id(each) for _, each in tensors} != {id(each) for each in _own(layer)}:
            made[key] = found, taken_bytes
        return found

    return converted


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same kind; libraries' own kinds are put together from their parts, which are copied."""
    if is_traceable_wrapper_subclass(tensor):
        names, said = tensor.__tensor_flatten__()
        parts = {name: _copied(getattr(tensor, name)) for name in names}
        made = type(tensor).__tensor_unflatten__(parts, said, tensor.size(), tensor.stride())
    else:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _own(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(), *layer.buffers()]
