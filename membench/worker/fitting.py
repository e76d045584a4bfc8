"""Refusing cases that cannot fit into memory, and finding those that may not, before anything is built or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from membench import plugins
from membench.host.device import Device
from membench.host.environment import available_bytes
from membench.units import format_bytes

if TYPE_CHECKING:
    from torch import nn

_NEAR = 1 / 8
"""The share of the free memory from which a case comes near it, by the rough arithmetic of ``rough_bytes``."""
_TRAINED_COPIES = 4
"""Weights, gradients and the two states of Adam."""
_TOKEN_BYTES = 4
"""Of a number that is computed for a token."""


class NearMemory(Exception):
    """A case may need more memory than there is.

    Attributes:
        free_bytes, where: as in ``protocol.messages.AsksForEstimate``.
    """

    def __init__(self, free_bytes: int, where: str) -> None:
        super().__init__(f"it comes near the {format_bytes(free_bytes)} that are {where}")
        self.free_bytes, self.where = free_bytes, where


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
    needed = _loading_bytes(model, stack)
    if needed is None:
        return
    free, where = _free(device)
    if not Device.parse(device).on_gpu:
        needed *= ranks
    if needed > free:
        raise plugins.DoesNotFit(f"loading needs {format_bytes(needed)}; {format_bytes(free)} are {where}")


def find_near_memory(model: plugins.Model, workload: plugins.Workload, device: str, ranks: int = 1) -> None:
    """Tell by rough arithmetic whether a case comes near the free memory; one of unknown size does not.

    On a GPU it initializes CUDA, so no process may be forked afterwards.

    Raises:
        NearMemory: if it does.
    """
    try:
        skeleton = model.skeleton()
    except NotImplementedError:
        return
    rough = rough_bytes(skeleton, workload)
    free, where = _free(device)
    if not Device.parse(device).on_gpu:
        rough *= ranks
    if rough > _NEAR * free:
        raise NearMemory(free, where)


def rough_bytes(skeleton: nn.Module, workload: plugins.Workload) -> int:
    """Return roughly what a case needs without any technique: no bound, but enough to tell small ones from large ones.

    It is the weights, with gradients and states if they are trained, and what all matrices compute for each token, or
    the widest of them if nothing is kept for a backward pass.
    """
    parameters = list(skeleton.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    widths = [parameter.shape[0] for parameter in parameters if parameter.ndim > 1]
    tokens = max(workload.tokens_per_step() or 0, workload.cached_tokens() or 0, workload.longest_sequence())
    if not workload.trains:
        return weights + tokens * max(widths, default=0) * _TOKEN_BYTES
    return _TRAINED_COPIES * weights + tokens * sum(widths) * _TOKEN_BYTES


def _free(device: str) -> tuple[int, str]:
    """Return how many bytes a case may take on a device, and the words for that."""
    import torch

    if Device.parse(device).on_gpu:
        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    return available_bytes(), "available on this machine"


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
