"""Weights of a mixture's experts, stacked and packed, of which one expert's matrix is unpacked at a time."""

from __future__ import annotations

import torch
from torch import nn

from membench.builtin.layers.packed import PackedWeight


class PackedExperts(nn.Module):
    """In place of a parameter (experts, rows, columns): ``packed[expert]`` is that expert's matrix, unpacked.

    Args:
        packed: the experts' matrices one below the other, each as (outputs, inputs).
        experts: how many.
        transposed: whether whoever asks wants (inputs, outputs).
    """

    def __init__(self, packed: PackedWeight, experts: int, transposed: bool) -> None:
        super().__init__()
        self.packed, self.experts, self.transposed = packed, experts, transposed

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        matrix = self.packed.part(int(expert), self.experts)
        return matrix.t() if self.transposed else matrix

    def extra_repr(self) -> str:
        return f"experts={self.experts}"
