"""Refusing cases that cannot fit into memory, before anything is built or written."""

from __future__ import annotations

from collections.abc import Sequence

from membench import plugins
from membench.host.device import Device
from membench.host.environment import available_bytes
from membench.units import format_bytes


def refuse_what_cannot_load(
    model: plugins.Model, stack: Sequence[plugins.Technique], device: str, ranks: int = 1
) -> None:
    """Compare the memory that loading a model surely needs with the free memory.

    On a GPU it initializes CUDA, so no process may be forked afterwards.

    Args:
        device: the device, as torch names it.
        ranks: how many load the model at the same time; those on a CPU share its memory.

    Raises:
        plugins.DoesNotFit: if it needs more.
    """
    import torch

    needed = _loading_bytes(model, stack)
    if needed is None:
        return
    if Device.parse(device).on_gpu:
        free, where = torch.cuda.mem_get_info(device)[0], "free on the GPU"
    else:
        needed *= ranks
        free, where = available_bytes(), "available on this machine"
    if needed > free:
        raise plugins.DoesNotFit(f"loading needs {format_bytes(needed)}; {format_bytes(free)} are {where}")


def _loading_bytes(model: plugins.Model, stack: Sequence[plugins.Technique]) -> int | None:
    """Return the bytes that loading surely takes, or ``None`` if unknown."""
    try:
        needed = model.needed_bytes()
    except NotImplementedError:  # it has no skeleton
        return None
    for position, technique in enumerate(stack):
        if needed is not None and type(technique).load is not plugins.Technique.load:
            needed = technique.loading_bytes(needed, stack[position + 1 :])
        if technique.applies_rest:
            break
    return needed
