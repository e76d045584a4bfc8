"""A linear layer that multiplies a sparse matrix."""

from __future__ import annotations

import torch
from torch import nn


class SparseLinear(nn.Module):
    """y = x·Wᵀ + b, with W (outputs, inputs) kept as compressed sparse rows in three plain tensors.

    Args:
        weight: of the layout ``torch.sparse_csr``.
    """

    row_indices: torch.Tensor
    column_indices: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Copies: the tensor's own parts would keep each other alive, and with them the int64 indices.
        self.values = nn.Parameter(weight.values().clone(), requires_grad=False)
        self.register_buffer("row_indices", weight.crow_indices().to(torch.int32))
        self.register_buffer("column_indices", weight.col_indices().to(torch.int32))
        self.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        # Autocast would cast to half precision, which no CPU kernel for sparse matrices takes.
        with torch.autocast(inputs.device.type, enabled=False):
            size = (self.out_features, self.in_features)
            weight = torch.sparse_csr_tensor(
                self.row_indices, self.column_indices, self.values, size, check_invariants=False
            )
            rows = inputs.reshape(-1, self.in_features).to(self.values.dtype)
            product = (weight @ rows.t()).t()  # nn.functional.linear with such a weight takes five times as long
            if self.bias is not None:
                product = product + self.bias
        return product.reshape(*inputs.shape[:-1], self.out_features).contiguous()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, values={self.values.numel()}"
