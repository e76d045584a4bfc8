"""Whether two outcomes are the same to the last bit, and whether they are numbers at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from membench.worker.storages import plain_tensors
from membench.worker.weights import kept_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENS = 16


def ids_to_read() -> torch.Tensor:
    """Token ids (T,) that every vocabulary has."""
    import torch

    return torch.arange(_TOKENS) % 2


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """All plain tensors that a module keeps, in order."""
    return [plain for tensor in kept_tensors(module) for plain in plain_tensors(tensor)]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether kind, shape and every bit are the same; no number is the same as no number."""
    import torch

    if (one.dtype, one.shape, one.layout) != (other.dtype, other.shape, other.layout):
        return False
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def is_finite(found: torch.Tensor | float) -> bool:
    return math.isfinite(found) if isinstance(found, float) else bool(found.float().isfinite().all())
