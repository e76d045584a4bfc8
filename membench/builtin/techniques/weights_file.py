"""A file that weights lie in while a model is built, so that no more of them is in memory than is worked on."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from membench.plugins import Unsuitable
from membench.units import format_bytes
from membench.worker.storages import has_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

_SMALLEST_BYTES = 2**20
"""Smaller tensors stay in memory until they are written: each mapping costs the kernel some."""

_ALIGNED_BYTES = 64
_PUNCH_HOLE = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE of linux/falloc.h

LENGTH_BYTES = 8
"""The file ends with its index as JSON, and the length of that in so many bytes."""

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
    "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64",
)  # fmt: skip


class WeightsFile:
    """Tensors one after the other, with an index of names, types, shapes and offsets at the end.

    Within ``building``, each large parameter and buffer that a module is given gets pages of the file as its memory:
    what initializes it writes to the file, and the kernel drops pages when memory is short.
    """

    _open: ClassVar[list[WeightsFile]] = []

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._end = 0
        self._places: dict[int, tuple[int, int, mmap.mmap]] = {}  # by address: offset, size, and what keeps it mapped
        self._entries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def building(self) -> Iterator[None]:
        """Have modules that are built meanwhile keep their weights in the file."""
        from torch.nn.modules import module as hooks

        removable = (
            hooks.register_module_parameter_registration_hook(self._take),
            hooks.register_module_buffer_registration_hook(self._take),
        )
        self._open.append(self)
        try:
            yield
        finally:
            self._open.remove(self)
            for handle in removable:
                handle.remove()

    def _take(self, module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        """Move the data of a tensor to the file. Views, and tensors of libraries' own types, stay where they are."""
        import torch

        del module, name
        if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not _is_whole(tensor.data):
            return
        if tensor.nbytes >= _SMALLEST_BYTES and not self.holds(tensor) and not _is_shared(tensor):
            tensor.data = self._new_like(tensor.data).copy_(tensor.data)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all data of a tensor are in the file, as one piece."""
        return self._place(tensor) is not None

    def _place(self, tensor: torch.Tensor) -> int | None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not has_memory(tensor):
            return None
        offset, size_bytes, _ = self._places.get(tensor.data_ptr(), (0, -1, None))
        return offset if tensor.nbytes <= size_bytes else None

    def _new_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same type and shape with pages of the file as its memory, appended to it."""
        import torch

        offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Writing to pages of a file for which there is no room would kill the process.
            os.posix_fallocate(self._file.fileno(), offset, tensor.nbytes)
        except OSError as error:
            raise Unsuitable(
                f"the checkpoint has no room in {self._path.parent} beyond {format_bytes(offset)}: {error.strerror}"
            ) from None
        self._end = offset + tensor.nbytes
        mapping = mmap.mmap(self._file.fileno(), tensor.nbytes, offset=offset)
        made = torch.frombuffer(mapping, dtype=tensor.dtype).view(tensor.shape)
        self._places[made.data_ptr()] = offset, tensor.nbytes, mapping
        return made.data  # a view would keep more than its own

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into the index, and into the file if its data are not there."""
        data = tensor.detach()
        offset = self._place(data) if data.nbytes else 0
        if offset is None and not has_memory(data):
            offset = self._reserve(data.nbytes)
        elif offset is None:
            plain = data.cpu().contiguous()
            is_large = plain.nbytes >= _SMALLEST_BYTES
            offset = self._place(self._new_like(plain).copy_(plain)) if is_large else self._append(plain)
        known = str(data.dtype).removeprefix("torch.")
        if known not in _DTYPES:
            raise Unsuitable(f"'{name}' is of type {known}, which the checkpoint of a loader cannot hold")
        self._entries[name] = {"dtype": known, "shape": list(data.shape), "offset": offset}

    def _append(self, tensor: torch.Tensor) -> int:
        """Write a small tensor at the end of the file, and return its offset."""
        import torch

        offset = self._reserve(tensor.nbytes)
        self._file.seek(offset)
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return offset

    def _reserve(self, size_bytes: int) -> int:
        """Leave room at the end of the file, and return its offset."""
        offset = -(-self._end // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self._end = offset + size_bytes
        return offset

    def finish(self) -> None:
        """Write the index, and give back the room of tensors that the module did not keep."""
        kept = {entry["offset"] for entry in self._entries.values()}
        fallocate = ctypes.CDLL(None).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
        for offset, size_bytes, _ in self._places.values():
            if offset not in kept:  # such as an output head that was then tied to the embedding
                fallocate(self._file.fileno(), _PUNCH_HOLE, offset, size_bytes)
        index = json.dumps(self._entries).encode()
        self._file.seek(self._end)
        self._file.write(index + len(index).to_bytes(LENGTH_BYTES, "little"))

    def close(self) -> None:
        """Close the file; tensors in it stay mapped."""
        self._file.close()


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized tensor: in memory, or in the file that is open for a model that is being built."""
    import torch

    if WeightsFile._open and tensor.device.type == "cpu" and tensor.nbytes >= _SMALLEST_BYTES:
        return WeightsFile._open[-1]._new_like(tensor)
    return torch.empty_like(tensor)


def is_in_open_file(tensor: torch.Tensor) -> bool:
    """Whether the data of a tensor are in the file that is open for a model that is being built."""
    return any(file.holds(tensor) for file in WeightsFile._open)


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether anything else refers to the storage of a tensor, and would no longer see what is written to it."""
    import torch

    # One reference is the tensor's, and one that of the storage as an object here.
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a dense one on the CPU that has its storage for itself."""
    import torch

    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )
