"""Layers that are alike, converted once on fake tensors: quantizing one may take a hundred thousand operations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from membench.plugins import Technique
from membench.plugins.layer_wise import LayerWise
from membench.plugins.replacing import numberless
from membench.worker.tracing.fake_modules import copied
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
            return copied(first)
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


def _own(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(), *layer.buffers()]
