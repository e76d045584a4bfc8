"""A checkpoint as a memory-mapped file: its tensors are pages of the file until they are taken over."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import shutil
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from membench.builtin.techniques.weights_file import LENGTH_BYTES, WeightsFile, empty_like, is_in_open_file
from membench.host import procfs
from membench.host.environment import available_bytes
from membench.plugins import DoesNotFit, Model, Unsuitable
from membench.units import format_bytes
from membench.worker.storages import has_memory, plain_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

Part: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""As ``Context.part``."""

_BLOCK_BYTES, _MOST_BLOCKS = 2**20, 32


@dataclass
class Held:
    """A tensor that a module holds, once for all the places that share it, named by the first of them."""

    name: str
    tensor: torch.Tensor
    places: list[tuple[MutableMapping[str, Any], str]] = field(default_factory=list)

    def fill(self, tensor: torch.Tensor) -> None:
        """Put a tensor in all of its places: a parameter where one was, and expanded as the tensor was there."""
        from torch import nn

        tensor = tensor.expand(self.tensor.shape)
        if isinstance(self.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
            # What optimizers are told by attributes of a parameter; a fake one keeps its device in those, too.
            vars(tensor).update({name: value for name, value in vars(self.tensor).items() if name not in vars(tensor)})
        for holder, key in self.places:
            holder[key] = tensor


def held_by(module: nn.Module) -> list[Held]:
    """Every tensor of a module: parameters, buffers (those too that no state dict has), and plain attributes.

    A skeleton on the meta device has no data in any of them, rotary angles included, which no checkpoint brings.
    """
    import torch

    found: dict[int, Held] = {}
    for path, child in module.named_modules():
        for holder in (child._parameters, child._buffers, vars(child)):
            for key, tensor in holder.items():
                if isinstance(tensor, torch.Tensor):
                    name = f"{path}.{key}" if path else key
                    found.setdefault(id(tensor), Held(name, tensor)).places.append((holder, key))
    return list(found.values())


def write(make: Callable[[], nn.Module], path: Path) -> None:
    """Build a module and keep every tensor of it in a file, each once.

    It is built in the file, without its weights in memory, as far as its code lets parameters be replaced when a module
    registers them.

    Of an expanded tensor the file has what is in memory; views of one storage are tensors of their own there.

    Raises:
        Unsuitable: where there is no room for it, or where such a file cannot hold a tensor.
    """
    import torch

    with contextlib.closing(WeightsFile(path)) as file:
        with file.building():
            module = make()
        kept: dict[str, torch.Tensor] = {}
        for held in held_by(module):
            tensor = held.tensor.detach()
            if tensor.layout is not torch.strided:
                raise Unsuitable(f"'{held.name}' is sparse ({tensor.layout}), which the file of a loader cannot hold")
            for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
                tensor = tensor.narrow(axis, 0, 1) if stride == 0 and size > 1 else tensor
            kept[held.name] = tensor
        needs_room(sum(tensor.nbytes for tensor in kept.values() if not file.holds(tensor)), path.parent)
        for name, tensor in kept.items():
            file.add(name, tensor)
        file.finish()


def needs_room(size_bytes: int, folder: Path) -> None:
    """Refuse the case if a folder has no room for a file.

    Raises:
        DoesNotFit: if the folder lies in memory, and there is not enough of that.
        Unsuitable: with what is wanted and what is free.
    """
    if procfs.is_in_memory(folder) and size_bytes > (left_bytes := available_bytes()):
        raise DoesNotFit(
            f"the checkpoint in {folder}, which is in memory, needs {format_bytes(size_bytes)};"
            f" {format_bytes(left_bytes)} are available on this machine"
        )
    free_bytes = shutil.disk_usage(folder).free
    if size_bytes > free_bytes:
        wanted, free = format_bytes(size_bytes), format_bytes(free_bytes)
        raise Unsuitable(f"the checkpoint takes {wanted}, and {free} are free in {folder}")


class MappedCheckpoint:
    """Reads what ``write`` wrote. The mapping is private: what is written to it goes to anonymous pages."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        end = len(self._mapping) - LENGTH_BYTES
        index_bytes = int.from_bytes(self._mapping[end:], "little")
        self._entries: dict[str, Any] = json.loads(self._mapping[end - index_bytes : end])
        self._first_byte = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._without_memory: dict[int, torch.UntypedStorage] = {}
        """What was given of fake tensors, which have no addresses to be known by."""

    def skeleton(self, model: Model) -> nn.Module:
        """The model on the meta device, to be filled with what is here.

        Raises:
            Unsuitable: where it has no skeleton, or one that holds other tensors than the model that was built.
        """
        try:
            module = model.skeleton()
        except NotImplementedError as error:
            raise Unsuitable(str(error)) from None
        unlike = {held.name for held in held_by(module)} ^ self._entries.keys()
        if unlike:
            raise Unsuitable(f"the model and its skeleton on the meta device differ in '{min(unlike)}'")
        return module

    def mapped(self, name: str) -> torch.Tensor:
        """A tensor whose data are the file's pages, which come as they are read."""
        import torch

        entry = self._entries[name]
        dtype, count = getattr(torch, entry["dtype"]), math.prod(entry["shape"])
        if not count:
            return torch.empty(entry["shape"], dtype=dtype)
        flat = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=entry["offset"])
        if not has_memory(flat):
            storage = flat.untyped_storage()
            self._without_memory[storage._cdata] = storage
        return flat.view(entry["shape"]).data  # a view would keep the mapping wherever its data go

    def touched(self, name: str, part: Part) -> torch.Tensor:
        """A mapped tensor with all its pages there, so that file pages do not grow while something reads them.

        Resident memory alone does not say what of its peak is live and what are pages that the file lends. Where these
        come and go a block at a time, each a part of its own (``map``, ``unmap``), it says so to a block.
        """
        tensor = self.mapped(name)
        for block in _blocks(tensor):
            with part("map"):
                block[:: mmap.PAGESIZE].sum()
        return tensor

    def read(self, name: str) -> torch.Tensor:
        """A tensor in anonymous memory; no more than a block of it is there twice at any moment."""
        tensor = self.mapped(name)
        self.take_over(tensor)
        return tensor

    def take_over(self, tensor: torch.Tensor) -> None:
        """Give a tensor whose data are mapped memory of its own; each block's pages go back once it is copied.

        A quantized tensor is opened. One that is not mapped stays as it is.
        """
        import torch

        if hasattr(tensor, "__tensor_flatten__"):
            for plain in plain_tensors(tensor):
                self.take_over(plain)
            return
        source = tensor.data
        if source.device.type != "cpu" or not self._is_mapped(source):
            return
        own = torch.empty_like(source)
        if source.is_contiguous():
            for block, into in zip(_blocks(source), _blocks(own), strict=True):
                into.copy_(block)
                self._drop_pages_within(block)
        else:
            own.copy_(source)
        tensor.data = own

    def _is_mapped(self, tensor: torch.Tensor) -> bool:
        if not has_memory(tensor):
            return tensor.untyped_storage()._cdata in self._without_memory
        return 0 <= tensor.data_ptr() - self._first_byte < len(self._mapping)

    def _drop_pages_within(self, block: torch.Tensor) -> None:
        """Pages at the edges stay: a neighbour may have been written to, and live there alone."""
        if not has_memory(block):
            return
        start = block.data_ptr() - self._first_byte
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def drop_pages(self, names: Iterable[str], part: Part) -> None:
        """Give all pages back, those of some tensors block by block.

        What still refers to them reads the file again, without what was written to it.
        """
        for name in names:
            for block in _blocks(self.mapped(name)):
                with part("unmap"):
                    self._drop_pages_within(block)
        self._mapping.madvise(mmap.MADV_DONTNEED)


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in anonymous memory with the values of one that is mapped from a file, whose pages are given back.

    Block by block, so that file pages do not pile up beside the copy and hide what of resident memory is live. One that
    is not mapped from a file is copied plainly. Nobody may have written to the mapped one.
    """
    if is_in_open_file(tensor):
        return tensor
    lent = any(first <= tensor.data_ptr() < last for first, last in procfs.file_mappings())
    if not lent or not tensor.is_contiguous() or tensor.nbytes == 0:
        return empty_like(tensor).copy_(tensor)
    own = empty_like(tensor)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # a neighbour reads its page again
    for block, into in zip(_blocks(tensor), _blocks(own), strict=True):
        into.copy_(block)
        # All of it, and not the block alone: the kernel maps pages of earlier ones again that it has at hand.
        madvise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_DONTNEED)
    return own


def _blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A contiguous tensor's bytes in blocks of 1 MiB, and in 32 blocks where it is larger than 32 MiB."""
    import torch

    step = max(_BLOCK_BYTES, -(-tensor.nbytes // _MOST_BLOCKS // mmap.PAGESIZE) * mmap.PAGESIZE)
    return tensor.view(-1).view(torch.uint8).split(step)
