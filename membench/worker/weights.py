"""Sizes of a module's weights, from the storages of its tensors, and fingerprints to detect changes of a module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.host import procfs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.protocol.readings import ModulesReading


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors in a tensor: itself, or the inner tensors (data, scales) of a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


_DEEPEST = 3


def own_tensors(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a layer without its sublayers, by name: parameters, buffers, and tensors in attributes.

    ``parameters()`` and ``buffers()`` miss some tensors: bitsandbytes keeps scales in attributes of parameters and in
    objects of layers, and torch's pruning keeps a second mask in a hook.
    """
    for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
        if tensor is not None:
            yield name, tensor
            yield from _in_attributes(vars(tensor), _DEEPEST)
    listed = ("_parameters", "_buffers", "_modules")
    yield from _in_attributes({name: value for name, value in vars(layer).items() if name not in listed}, _DEEPEST)


def _in_attributes(attributes: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif not depth or isinstance(value, torch.nn.Module | type):
            continue
        elif isinstance(value, Mapping):
            yield from _in_attributes(value, depth - 1)
        elif hasattr(value, "__dict__"):
            yield from _in_attributes(vars(value), depth - 1)


def kept_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all tensors of a module and its sublayers; a tensor may occur more than once."""
    return (tensor for layer in module.modules() for _, tensor in own_tensors(layer))


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters, buffers and tensors in attributes, each storage counted once and in full."""
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
    """Return the bytes of a module's weights by layer, largest first.

    Each storage counts for the first layer that has it. Layers of the same size whose names differ only in numbers are
    one entry; ``*`` replaces the numbers that differ. The smallest entries beyond a hundred are summed up in one.
    """
    from membench.protocol.readings import ModulesReading  # techniques import this module when they are listed

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
        ModulesReading(_common_name(names), len(names), own * len(names)) for (_, own), names in groups.items()
    ]  # fmt: skip
    found.sort(key=lambda entry: -entry.bytes)
    kept, rest = found[:_MOST_GROUPS], found[_MOST_GROUPS:]
    if rest:
        smaller = ModulesReading(
            "smaller ones", sum(entry.count for entry in rest), sum(entry.bytes for entry in rest)
        )  # fmt: skip
        kept.append(smaller)
    return kept


def _common_name(names: Sequence[str]) -> str:
    """Return the names of similar layers as one, with ``*`` for the numbers that differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)


def fingerprint(module: nn.Module) -> list[tuple[object, ...]]:
    """Return a fingerprint of a module, which differs after a technique has changed the module.

    It covers the modules with their settings and configurations (such as the attention implementation or activation
    checkpointing), and the types, shapes and addresses of their tensors with a sample of their values.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    modules = list(module.named_modules())
    configurations = {id(child.config): child.config for _, child in modules if hasattr(child, "config")}
    mapped = procfs.file_mappings()
    return [
        *((name, type(child), _settings(child)) for name, child in modules),
        *(("", type(configuration), _settings(configuration)) for configuration in configurations.values()),
        *(
            (name, type(t), t.dtype, tuple(t.shape), t.requires_grad, t._version, _sample(t, mapped))
            for name, t in tensors
        ),
    ]


_SAMPLED = 4096
_STRIDE = 2_654_435_761  # a prime, so that samples cover all rows and columns


def _sample(tensor: torch.Tensor, mapped: Sequence[tuple[int, int]]) -> tuple[object, ...]:
    """Return the address and a sample of the values of a tensor, since writes to ``.data`` do not change its version.

    Args:
        mapped: address ranges of mapped files. Values there are not read, since that would make the pages resident.
    """
    import numpy
    import torch

    found: list[object] = []
    for plain in plain_tensors(tensor.data):
        if plain.device.type == "meta" or plain.layout is not torch.strided or plain.is_quantized or not plain.numel():
            continue
        address = plain.data_ptr()
        found.append(address)
        if not any(first <= address < last for first, last in mapped):
            count = plain.untyped_storage().nbytes() // plain.element_size()
            flat = plain.as_strided((count,), (1,), 0).view(torch.uint8).view(count, plain.element_size())
            places = numpy.arange(min(_SAMPLED, count)) * _STRIDE % count
            # numpy is used on the CPU, because torch needs its threads, which a forked preparing process does not have.
            sample = (
                flat.numpy()[places] if plain.device.type == "cpu" else flat[torch.from_numpy(places)].cpu().numpy()
            )
            found.append(sample.tobytes())
    return tuple(found)


def _settings(holder: object) -> int:
    """Return a hash of an object's attributes: the values of plain ones, the sizes of dicts, the types of the others.

    The training mode is excluded, because the workload sets it.
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
