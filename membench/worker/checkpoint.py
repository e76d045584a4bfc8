"""Saving a module as a user would, to measure its size on disk."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    from torch import nn


def save(module: nn.Module, folder: Path) -> tuple[int | None, str]:
    """Write a checkpoint, measure its size and remove it.

    It is written by safetensors if all tensors are plain. If some are tensor subclasses such as torchao's, whose outer
    storage safetensors cannot read, it is written by ``torch.save`` of the state dict.

    Returns:
        the size in bytes and the library that wrote it, or ``None`` and the reason why it was not written.
    """
    import safetensors.torch
    import torch

    if not weight_bytes(module):
        return None, "the model has no weights"
    if weight_bytes(module) * 1.1 > shutil.disk_usage(folder).free:
        return None, f"not enough room in {folder} for the checkpoint"
    path = folder / "checkpoint"
    tensors = itertools.chain(module.parameters(), module.buffers())
    if any(hasattr(tensor.data, "__tensor_flatten__") for tensor in tensors):
        torch.save(module.state_dict(), path)
        library = "torch.save"
    else:
        safetensors.torch.save_model(module, str(path))
        library = "safetensors"
    size_bytes = path.stat().st_size
    path.unlink()
    return size_bytes, library
