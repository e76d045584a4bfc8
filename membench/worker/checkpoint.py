"""Saving a module as a user would, to measure its size on disk."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import summary
from membench.host.out_of_memory import is_out_of_memory
from membench.plugins import Context, Parallel, Ranks, Technique, parallel_last
from membench.worker import ranks_checkpoint
from membench.worker.agreement import come_through, on_any
from membench.worker.storages import key_of
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

_BY_ANOTHER_RANK = "another rank wrote it"


def save(
    module: nn.Module, folder: Path, techniques: Sequence[Technique] = (), context: Context | None = None
) -> tuple[int | None, str]:
    """Write a checkpoint of the whole model, measure its size and remove it. All ranks of a case must call it.

    Where a technique has split the model over ranks, the last one that did writes it by its own means. Else the first
    rank does, by safetensors where that can hold it: tensors that are plain and contiguous, none of which is a part
    of another. All else (tensor subclasses such as torchao's, sparse matrices, expanded tensors, views of a common
    storage, state that is no tensor) is written by ``torch.save`` of the state dict, which keeps each storage once.

    Returns:
        the size in bytes and the library that wrote it, or ``None`` and the reason why it was not written.
    """
    if not weight_bytes(module):
        return None, "the model has no weights"
    ranks = None if context is None else context.ranks
    members = [each for each in parallel_last(techniques) if isinstance(each, Parallel)]
    writers = [each for each in members if each.splits_model or each.checkpoint == "sharded"]
    if ranks is not None and context is not None and writers:
        last, folder = writers[-1], ranks.shared / "checkpoint"
        parts = math.prod(ranks.degree(each.dimension) for each in members if each.splits_model)
        if on_any(ranks, _exceeds_room(weight_bytes(module) * parts, ranks.shared)):
            return None, _no_room(ranks.shared)
        written = {"gathered": ranks_checkpoint.gathered, "sharded": ranks_checkpoint.sharded}[last.checkpoint]
        return _measured(lambda: last.save(module, folder, context) or written(module, folder), folder, ranks)
    if ranks is not None and ranks.number:
        return None, _BY_ANOTHER_RANK
    if _exceeds_room(weight_bytes(module), folder):
        return None, _no_room(folder)
    path = folder / "checkpoint"
    return _measured(lambda: _save_alone(module, path), path, None)


def _exceeds_room(size_bytes: int, folder: Path) -> bool:
    return size_bytes * 1.1 > shutil.disk_usage(folder).free


def _no_room(folder: Path) -> str:
    return f"not enough room in {folder} for the checkpoint"


def _measured(write: Callable[[], str], path: Path, ranks: Ranks | None) -> tuple[int | None, str]:
    """Write a file or a folder and return its size on the first rank, which removes it.

    Ranks write together, and none of them has a checkpoint if one cannot write its part.

    Raises:
        Exception: what a rank failed with while another waits for it.
    """
    try:
        how = _written_by_all(write, ranks)
        if ranks is not None and ranks.number:
            return None, _BY_ANOTHER_RANK
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files), how
    except Exception as error:  # a state dict is the model's own code
        if is_out_of_memory(error):
            raise
        return None, f"the checkpoint cannot be written: {summary(error)}"
    finally:
        if ranks is None or not ranks.number:
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _written_by_all(write: Callable[[], str], ranks: Ranks | None) -> str:
    try:
        how = write()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        come_through(ranks, "checkpoint", error)
        on_any(ranks, True)
        raise
    come_through(ranks, "checkpoint")
    if on_any(ranks, False):
        raise OSError("another rank cannot write its part")
    return how


def _save_alone(module: nn.Module, path: Path) -> str:
    import safetensors.torch
    import torch

    if _fits_safetensors(module):
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # an entry that is no tensor
            safetensors.torch.save_model(module, str(path))
            return "safetensors"
    torch.save(module.state_dict(), path)
    return "torch.save"


def _fits_safetensors(module: nn.Module) -> bool:
    """Whether safetensors holds each parameter and buffer as it is; tensors that are equal in all are kept once."""
    import torch

    in_storage: dict[tuple[str, int], set[tuple[object, ...]]] = {}
    for tensor in _saved_tensors(module):
        if hasattr(tensor.data, "__tensor_flatten__") or tensor.layout is not torch.strided or tensor.is_complex():
            return False
        if not tensor.is_contiguous():
            return False
        if tensor.numel() and tensor.device.type != "meta":
            part = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
            in_storage.setdefault(key_of(tensor), set()).add(part)
    return all(len(parts) == 1 for parts in in_storage.values())


def _saved_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers that a state dict has."""
    for layer in module.modules():
        buffers = {name: held for name, held in layer._buffers.items() if name not in layer._non_persistent_buffers_set}
        yield from (tensor for tensor in (*layer._parameters.values(), *buffers.values()) if tensor is not None)
