"""Bytes of a module's weights, counted where they are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.host import procfs
from membench.protocol.readings import ModulesReading

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


_DEEPEST = 3


def own_tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a layer itself keeps, by name: parameters, buffers, and what lies beside them.

    bitsandbytes keeps its scales in attributes of parameters and in objects of layers, torch's pruning a second mask in
    a hook: neither ``parameters()`` nor ``buffers()`` finds them.
    """
    for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
        if tensor is not None:
            yield name, tensor
            yield from _beside(vars(tensor), _DEEPEST)
    listed = ("_parameters", "_buffers", "_modules")
    yield from _beside({name: value for name, value in vars(layer).items() if name not in listed}, _DEEPEST)


def _beside(attributes: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif not depth or isinstance(value, torch.nn.Module | type):
            continue
        elif isinstance(value, Mapping):
            yield from _beside(value, depth - 1)
        elif hasattr(value, "__dict__"):
            yield from _beside(vars(value), depth - 1)


def kept_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a module and its layers keep; the same one may come twice."""
    return (tensor for layer in module.modules() for _, tensor in own_tensors(layer))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of parameters, buffers and what is kept beside them, each storage counted once and whole."""
    storages: dict[tuple[str, int], int] = {}
    for tensor in kept_tensors(module):
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            if plain.device.type == "meta":
                storages[("meta", id(tensor))] = plain.nbytes
            else:
                storages[(str(plain.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


_NUMBER_IN_NAME = re.compile(r"(?<![^.])\d+(?![^.])")
_MOST_GROUPS = 100


def bytes_by_module(module: nn.Module) -> list[ModulesReading]:
    """What a module's weights are made of, the largest first; each storage counts once, where it is met first.

    Layers whose names differ in numbers alone and whose sizes are the same are one entry, named with ``*`` for numbers
    that differ. Beyond a hundred entries the smallest are summed up.
    """
    seen: set[tuple[str, int]] = set()
    groups: dict[tuple[str, int], list[str]] = {}
    for name, layer in module.named_modules():
        own = 0
        for _, tensor in own_tensors(layer):
            for plain in plain_tensors(tensor):
                storage = plain.untyped_storage()
                key = (str(plain.device), storage.data_ptr())
                if plain.device.type != "meta" and key not in seen:
                    seen.add(key)
                    own += storage.nbytes()
        if own:
            groups.setdefault((_NUMBER_IN_NAME.sub("*", name), own), []).append(name or "the model itself")
    found = [
        ModulesReading(_in_common(names), len(names), own * len(names)) for (_, own), names in groups.items()
    ]  # fmt: skip
    found.sort(key=lambda entry: -entry.bytes)
    kept, rest = found[:_MOST_GROUPS], found[_MOST_GROUPS:]
    if rest:
        smaller = ModulesReading(
            "smaller ones", sum(entry.count for entry in rest), sum(entry.bytes for entry in rest)
        )  # fmt: skip
        kept.append(smaller)
    return kept


def _in_common(names: Sequence[str]) -> str:
    """The name that fits them all: those of layers of one kind differ in numbers alone."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def fingerprint(module: nn.Module) -> list[tuple[object, ...]]:
    """What a technique would change if it did anything.

    Modules, their settings and their configuration's (which attention, whether activations are kept), and the kind,
    shape and place of their tensors, with some of their values.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    modules = list(module.named_modules())
    configurations = {id(child.config): child.config for _, child in modules if hasattr(child, "config")}
    lent = procfs.file_mappings()
    return [
        *((name, type(child), _settings(child)) for name, child in modules),
        *(("", type(configuration), _settings(configuration)) for configuration in configurations.values()),
        *(
            (name, type(t), t.dtype, tuple(t.shape), t.requires_grad, t._version, _contents(t, lent))
            for name, t in tensors
        ),
    ]


_SAMPLED = 4096
_STRIDE = 2_654_435_761  # a prime: it goes through all rows and columns


def _contents(tensor: torch.Tensor, lent: Sequence[tuple[int, int]]) -> tuple[object, ...]:
    """Where a tensor's data lie and some values of it: what is written to ``.data`` raises no version.

    Args:
        lent: ranges of addresses that files lend. What lies there is not read: that would bring its pages in.
    """
    import numpy
    import torch

    found: list[object] = []
    for plain in plain_tensors(tensor.data):
        if plain.device.type == "meta" or plain.layout is not torch.strided or plain.is_quantized or not plain.numel():
            continue
        address = plain.data_ptr()
        found.append(address)
        if not any(first <= address < last for first, last in lent):
            count = plain.untyped_storage().nbytes() // plain.element_size()
            flat = plain.as_strided((count,), (1,), 0).view(torch.uint8).view(count, plain.element_size())
            places = numpy.arange(min(_SAMPLED, count)) * _STRIDE % count
            # By numpy on a CPU: torch would want its threads, which a process that prepares a case does not have.
            sample = (
                flat.numpy()[places] if plain.device.type == "cpu" else flat[torch.from_numpy(places)].cpu().numpy()
            )
            found.append(sample.tobytes())
    return tuple(found)


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
