"""Sizes of a module's weights, from the storages of its tensors, and fingerprints to detect changes of a module."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.host import procfs
from membench.worker.storages import Storages, has_memory, plain_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.protocol.readings import ModulesReading


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
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _in_attributes({f"{name}.{number}": each for number, each in enumerate(value)}, depth - 1)
        elif hasattr(value, "__dict__"):
            yield from _in_attributes(vars(value), depth - 1)


def kept_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all tensors of a module and its sublayers; a tensor may occur more than once."""
    return (tensor for layer in module.modules() for _, tensor in own_tensors(layer))


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all that the layers of a module keep; each byte that several tensors share counts once.

    That is parameters, buffers, tensors in attributes and packed weights. A tensor keeps the whole of its storage. On
    the meta device it is what tensors would take, each by itself.
    """
    storages, packed = Storages(), _PackedWeights()
    planned: dict[tuple[int, int], int] = {}
    for layer in module.modules():
        for _, tensor in own_tensors(layer):
            storages.add(tensor)
            for number, plain in enumerate(plain_tensors(tensor)):
                if plain.device.type == "meta":
                    planned[id(tensor), number] = plain.nbytes
        packed.add(layer)
    return storages.bytes + sum(planned.values()) + packed.bytes


class _PackedWeights:
    """Weights that layers of ``torch.ao`` keep packed for their kernels, out of reach of Python.

    They are counted as they unpack; the kernels' own layout pads some rows.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: dict[int, object] = {}  # keeps them, so that no other object gets their address

    def add(self, layer: nn.Module) -> int:
        """Add those in a layer's own attributes; return how many bytes were not counted before."""
        before = self.bytes
        for value in vars(layer).values():
            self._add_object(value)
        return self.bytes - before

    def _add_object(self, value: object) -> None:
        import torch

        if not isinstance(value, torch.ScriptObject) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if not value._type().qualified_name().startswith("__torch__.torch.classes."):
            return
        with contextlib.suppress(RuntimeError, AttributeError):  # an object that cannot be taken apart
            self._add_state(value.__getstate__())

    def _add_state(self, state: object) -> None:
        import torch

        if isinstance(state, torch.Tensor):
            self.bytes += Storages([state]).bytes
        elif isinstance(state, list | tuple):
            for each in state:
                self._add_state(each)
        else:
            self._add_object(state)


_NUMBER_IN_NAME = re.compile(r"(?<![^.])\d+(?![^.])")
_MOST_GROUPS = 100


def bytes_by_module(module: nn.Module) -> list[ModulesReading]:
    """Return the bytes of a module's weights by layer, largest first.

    Memory that layers share counts for the first of them. Layers of the same size whose names differ only in numbers
    are one entry; ``*`` replaces the numbers that differ. The smallest entries beyond a hundred are summed up in one.
    """
    from membench.protocol.readings import ModulesReading  # techniques import this module when they are listed

    storages, packed = Storages(), _PackedWeights()
    groups: dict[tuple[str, int], list[str]] = {}
    for name, layer in module.named_modules():
        own = sum(storages.add(tensor) for _, tensor in own_tensors(layer)) + packed.add(layer)
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


def fingerprint(module: nn.Module) -> bytes:
    """Return a fingerprint of a module, which differs after a technique has changed the module.

    It covers the modules with their settings and configurations (such as the attention implementation or activation
    checkpointing), and the types, shapes and addresses of their tensors with a sample of their values. It is a hash:
    samples that are kept would be memory of the harness in what is measured.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    configurations = set()
    for name, child in module.named_modules():
        add(name, id(type(child)), _settings(child))
        configuration = getattr(child, "config", None)
        if configuration is not None and id(configuration) not in configurations:
            configurations.add(id(configuration))
            add(id(type(configuration)), _settings(configuration))
    mapped = procfs.file_mappings()
    for name, t in itertools.chain(module.named_parameters(), module.named_buffers()):
        add(name, id(type(t)), str(t.dtype), tuple(t.shape), t.requires_grad, t._version)
        for part in _sample(t, mapped):
            digest.update(part)
    return digest.digest()


_SAMPLED = 4096
_STRIDE = 2_654_435_761  # a prime, so that samples cover all rows and columns


def _sample(tensor: torch.Tensor, mapped: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the address and a sample of the values of a tensor, since writes to ``.data`` do not change its version.

    Args:
        mapped: address ranges of mapped files. Values there are not read, since that would make the pages resident.
    """
    import numpy
    import torch

    for plain in plain_tensors(tensor.data):
        if plain.device.type == "meta" or plain.layout is not torch.strided or plain.is_quantized or not plain.numel():
            continue
        if not has_memory(plain):
            yield str(plain.untyped_storage()._cdata).encode()
            continue
        address = plain.data_ptr()
        yield str(address).encode()
        if not any(first <= address < last for first, last in mapped):
            # The storage is not asked for: torch keeps an object for each that was, which would be in the phase.
            steps = zip(plain.shape, plain.stride(), strict=True)
            count = 1 + sum((size - 1) * stride for size, stride in steps)
            flat = plain.as_strided((count,), (1,)).view(torch.uint8).view(count, plain.element_size())
            places = numpy.arange(min(_SAMPLED, count)) * _STRIDE % count
            # numpy is used on the CPU, because torch needs its threads, which a forked preparing process does not have.
            sample = (
                flat.numpy()[places] if plain.device.type == "cpu" else flat[torch.from_numpy(places)].cpu().numpy()
            )
            yield sample.tobytes()


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
