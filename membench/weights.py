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
    """What a technique would change if it did anything.

    Modules, their settings and their configuration's (which attention, whether activations are kept), and the kind,
    shape and place of their tensors.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    modules = list(module.named_modules())
    configurations = {id(child.config): child.config for _, child in modules if hasattr(child, "config")}
    return [
        *((name, type(child), _settings(child)) for name, child in modules),
        *(("", type(configuration), _settings(configuration)) for configuration in configurations.values()),
        *((name, type(t), t.dtype, tuple(t.shape), t.requires_grad, t._version) for name, t in tensors),
    ]


def _settings(holder: object) -> int:
    """A hash of an object's plain attributes, of how many hooks and parts it has, and of what kind the others are.

    Whether it is in training mode is left out: the workload settles that.
    """
    kept: list[tuple[str, object]] = []
    for name, value in getattr(holder, "__dict__", {}).items():
        if name == "training":
            continue
        if isinstance(value, bool | int | float | str):
            kept.append((name, value))
        else:
            kept.append((name, len(value) if isinstance(value, dict) else type(value)))
    return hash(tuple(kept))
