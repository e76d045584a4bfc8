"""Bytes of tensors: each byte of memory counts once, however many tensors, storages or views share it."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def inner_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that one of a subclass consists of, by name; a DTensor names its mesh, too, which is none."""
    import torch

    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        inner = getattr(tensor, name)
        if isinstance(inner, torch.Tensor):
            yield name, inner


def has_memory(tensor: torch.Tensor) -> bool:
    """Return whether a plain tensor has an address: fake ones, with which cases are estimated, have none."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that ranks share (DTensor); any other as it is."""
    part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold a tensor's values: itself, or the inner ones of a quantized, split or sparse one.

    Of a tensor that ranks share (DTensor) it is this rank's part.
    """
    import torch

    if hasattr(tensor, "__tensor_flatten__"):
        for _, inner in inner_tensors(tensor):
            yield from plain_tensors(inner)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_nested:
        yield from (tensor.values(), tensor._nested_tensor_size(), tensor._nested_tensor_strides())
    elif tensor.is_quantized and tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        yield from (tensor, tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
    else:
        yield tensor


def key_of(plain: torch.Tensor) -> tuple[str, int]:
    """Return the device and the address of a plain tensor's storage: tensors that share one have the same."""
    return str(plain.device), plain.untyped_storage().data_ptr()


def storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[str, int], int]:
    """Return the bytes of each storage of tensors, by device and address; those that overlap are not told apart.

    ``Storages`` counts each byte once instead.
    """
    found: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        # Not detached first: a detached copy may own inner tensors, which would be freed before they are counted.
        for plain in plain_tensors(tensor):
            if plain.device.type != "meta":
                found[key_of(plain)] = plain.untyped_storage().nbytes()
    return found


class Storages:
    """Ranges of memory that tensors hold, by device."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self.bytes = 0
        self._ranges: dict[str, tuple[list[int], list[int]]] = {}
        self._opaque: set[tuple[str, int]] = set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> int:
        """Add a tensor, with the whole of its storage; return how many of the bytes were not counted before."""
        return sum(self._add_plain(plain) for plain in plain_tensors(tensor))

    def _add_plain(self, plain: torch.Tensor) -> int:
        device = str(plain.device)
        if plain.device.type == "meta":
            return 0
        try:
            storage = plain.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a layout without a storage, such as oneDNN's
            key = (device, id(plain))
            new_bytes = 0 if key in self._opaque else plain.numel() * plain.element_size()
            self._opaque.add(key)
        else:
            return self.cover(device, storage.data_ptr(), storage.nbytes())
        self.bytes += new_bytes
        return new_bytes

    def copy(self) -> Storages:
        """Return a copy, to which more can be added."""
        copied = Storages()
        copied.bytes, copied._opaque = self.bytes, self._opaque.copy()
        copied._ranges = {device: (starts.copy(), ends.copy()) for device, (starts, ends) in self._ranges.items()}
        return copied

    def cover(self, device: str, first: int, size_bytes: int) -> int:
        """Add a range of addresses; return how many bytes of it no earlier one has covered."""
        if not size_bytes:
            return 0
        starts, ends = self._ranges.setdefault(device, ([], []))
        last = first + size_bytes
        left, right = bisect.bisect_left(ends, first), bisect.bisect_right(starts, last)
        covered_before = sum(ends[place] - starts[place] for place in range(left, right))
        if left < right:
            first, last = min(first, starts[left]), max(last, ends[right - 1])
        starts[left:right], ends[left:right] = [first], [last]
        new_bytes = last - first - covered_before
        self.bytes += new_bytes
        return new_bytes
