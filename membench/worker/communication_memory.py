"""Memory that a rank holds for communication: the weights that FSDP gathers, and the buckets of DDP's gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def gathered_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what FSDP holds of a module besides its shards.

    That is the gathered weights of layers that are in use, and the input or output of a gathering or scattering that is
    on its way or not freed yet. Tensors that it has emptied are of no size.

    Source: torch.distributed.fsdp's own state of each module, of torch 2.13.
    """
    seen = set()
    for group in _groups(module):
        for parameter in group.fsdp_params:
            yield from parameter.all_gather_outputs
            yield from parameter._unsharded_inner_tensors
        if group._all_gather_result is not None:
            yield group._all_gather_result.all_gather_output
        if id(group.comm_ctx) not in seen:
            seen.add(id(group.comm_ctx))
            if (gathering := getattr(group.comm_ctx, "all_gather_state", None)) is not None:
                yield gathering.all_gather_result.all_gather_output
            for scattering in getattr(group.comm_ctx, "reduce_scatter_states", ()):
                yield scattering.reduce_scatter_input


def has_shards(module: nn.Module) -> bool:
    """Whether FSDP has split the module or one of its layers."""
    return next(_groups(module), None) is not None


def gathered_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that FSDP gathers, as the layers use them; autograd accumulates gradients of these."""
    for group in _groups(module):
        yield from (parameter._unsharded_param for parameter in group.fsdp_params if _was_gathered(parameter))


def shards(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield this rank's shards of FSDP's parameters, which are the module's own only while nothing is gathered."""
    for group in _groups(module):
        yield from (parameter.sharded_param for parameter in group.fsdp_params)


def free_gathered(module: nn.Module) -> None:
    """Let FSDP free gathered weights that it keeps from one forward pass to the next, as it does those of the root."""
    for layer in module.modules():
        if next(_groups_of(layer), None) is not None:
            layer.reshard()  # type: ignore[operator]  # of torch.distributed.fsdp.FSDPModule


def _was_gathered(parameter: Any) -> bool:
    return hasattr(parameter, "_unsharded_param")


def _groups(module: nn.Module) -> Iterator[Any]:
    """Yield FSDP's groups of parameters that are gathered together."""
    for layer in module.modules():
        yield from _groups_of(layer)


def _groups_of(layer: nn.Module) -> Iterator[Any]:
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(layer, FSDPModule):
            yield from layer._get_fsdp_state()._fsdp_param_groups


@dataclass(frozen=True)
class OutOfReach:
    """Memory of tensors that Python code cannot reach.

    Attributes:
        ranges: device, first address and bytes of each range that is known.
        bytes: the size of those of which no address is known.
    """

    ranges: tuple[tuple[str, int, int], ...] = ()
    bytes: int = 0


class Buckets:
    """The buckets in which DDP's gradients travel; call it for what they hold now.

    Where gradients are views of the buckets, these are found through them, and stay when gradients are dropped.

    Source: the sizes that DDP reports of itself.
    """

    def __init__(self, wrapper: nn.Module) -> None:
        self._wrapper = wrapper
        self._ranges: dict[tuple[str, int], int] = {}

    def __call__(self) -> OutOfReach:
        known = self._wrapper._get_ddp_logging_data()  # type: ignore[operator]
        sizes = str(known.get("rebuilt_bucket_sizes") or known.get("bucket_sizes") or "")
        total = sum(int(size) for size in sizes.split(",") if size.strip())
        if known.get("gradient_as_bucket_view"):
            for parameter in self._wrapper.parameters():
                if parameter.grad is not None and parameter.grad._is_view():
                    storage = parameter.grad.untyped_storage()
                    self._ranges[str(parameter.grad.device), storage.data_ptr()] = storage.nbytes()
        if sum(self._ranges.values()) == total:
            return OutOfReach(tuple((device, first, size) for (device, first), size in self._ranges.items()))
        return OutOfReach(bytes=total)
