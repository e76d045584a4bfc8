"""What a module holds layer by layer, and what lives beside it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from membench.worker.storages import key_of, plain_tensors, storages
from membench.worker.weights import kept_tensors, own_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

SLACK_BYTES = 1024
"""What nobody need account for."""
_WITHOUT_BYTES = ("FakeTensor", "FunctionalTensor")
"""What torch.compile reckons with."""


class Holding(NamedTuple):
    """Of a layer: bytes of its storages that no earlier one has, what they would be in fp32, and what kind they are."""

    bytes: int
    in_fp32_bytes: int
    kinds: tuple[tuple[str, str, tuple[int, ...]], ...]


def by_layer(module: nn.Module, paths: Iterable[str] | None = None) -> dict[str, Holding]:
    """What each layer holds, by its path.

    Args:
        paths: where to count it: a layer at none of them counts at the one that it is below. By default its own.
    """
    known = None if paths is None else set(paths)
    seen: set[tuple[str, int]] = set()
    found: dict[str, Holding] = {}
    for path, layer in module.named_modules():
        place, inner = path, ""
        while known is not None and place not in known:
            place, _, last = place.rpartition(".")
            inner = f"{last}.{inner}"
        held = found.get(place, Holding(0, 0, ()))
        for name, tensor in own_tensors(layer):
            for plain in plain_tensors(tensor):
                key = key_of(plain)
                if key in seen:
                    continue
                seen.add(key)
                held = Holding(
                    held.bytes + plain.untyped_storage().nbytes(),
                    held.in_fp32_bytes + (4 * plain.numel() if plain.is_floating_point() else plain.nbytes),
                    (*held.kinds, (f"{inner}{name}", str(plain.dtype), tuple(plain.shape))),
                )
        found[place] = held
    return found


class Surroundings:
    """Every tensor that Python can reach when this is made, kept so that nobody gets its address."""

    def __init__(self) -> None:
        self._tensors = _tensors()
        gc.freeze()  # so that looking again is quick

    def release(self) -> None:
        gc.unfreeze()

    def additions(self, module: nn.Module) -> list[torch.Tensor]:
        """Tensors that have come to live since and lie in no layer of a module, one for each storage."""
        gc.collect()
        known = storages(self._tensors) | storages(kept_tensors(module))
        return list({key: tensor for tensor in _tensors() for key in storages([tensor]) if key not in known}.values())


def _tensors() -> list[torch.Tensor]:
    import torch

    # Not isinstance: it asks objects for their class, and some answer with a warning.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [tensor for tensor in found if type(tensor).__name__ not in _WITHOUT_BYTES]
