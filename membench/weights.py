"""Bytes of a module's weights, counted where they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor: itself, or what a subclass such as torchao's keeps (data, scales, …)."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage counted once and whole."""
    storages: dict[tuple[str, int], int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        for plain in plain_tensors(tensor.data):
            storage = plain.untyped_storage()
            if plain.device.type == "meta":
                storages[("meta", id(tensor))] = plain.nbytes
            else:
                storages[(str(plain.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def fingerprint(module: nn.Module) -> list[tuple[object, ...]]:
    """What a technique would change if it did anything: modules, and the kind, shape and place of their tensors."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, type(child)) for name, child in module.named_modules()] + [
        (name, type(t), t.dtype, tuple(t.shape), t.requires_grad, t._version) for name, t in tensors
    ]
