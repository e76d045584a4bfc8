"""Checkpoints of a model that several ranks hold together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.worker.storages import plain_tensors

if TYPE_CHECKING:
    from torch import nn


def gathered(module: nn.Module, folder: Path) -> str:
    """Write the whole model as one file: all ranks send their parts to the first one, which has it whole for a while.

    Tensors that layers share are written once.

    Returns:
        what wrote it.

    Source: torch.distributed.checkpoint.state_dict, with full_state_dict and cpu_offload; safetensors.
    """
    import safetensors.torch
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if distributed.get_rank():
        return "safetensors"
    further = set(_further_names(module))
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in state.items() if name not in further},
        str(folder / "model.safetensors"),
    )
    return "safetensors, gathered on one rank"


def sharded(module: nn.Module, folder: Path) -> str:
    """Write the model as a file of each rank with the parts that it holds, and one that says where they belong.

    Tensors that layers share are written once; torch alone would write them under each of their names.

    Returns:
        what wrote it.

    Source: torch.distributed.checkpoint.
    """
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    further = [_further_names(module)]
    # All leave out the same names, also a rank that has no part of a short tensor and so cannot tell.
    distributed.broadcast_object_list(further)
    state = get_model_state_dict(module)
    save({name: value for name, value in state.items() if name not in further[0]}, checkpoint_id=folder)
    return "torch.distributed.checkpoint, each rank its part"


def _further_names(module: nn.Module) -> list[str]:
    """Return the names in a state dict of tensors that it has under another name before."""
    once: dict[tuple[object, ...], str] = {}
    found = []
    for name, tensor in module.state_dict().items():
        # A state dict has objects of its own; those of a tensor that layers share hold the same memory.
        where = tuple((plain.data_ptr(), plain.shape) for plain in plain_tensors(tensor) if plain.numel())
        if where and once.setdefault((*where, tensor.shape), name) != name:
            found.append(name)
    return found
