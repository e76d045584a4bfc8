"""Sparse matrices of fake tensors, which torch does not have: rows compressed (CSR), to be multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


class FakeSparse:
    """A matrix of compressed sparse rows in three plain tensors, as far as layers use it."""

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self._rows, self._columns, self._values = rows, columns, values

    def crow_indices(self) -> torch.Tensor:
        return self._rows

    def col_indices(self) -> torch.Tensor:
        return self._columns

    def values(self) -> torch.Tensor:
        return self._values

    def __matmul__(self, dense: torch.Tensor) -> torch.Tensor:
        return dense.new_empty((self.shape[0], *dense.shape[1:]))


@contextlib.contextmanager
def multiplying_sparse_matrices(share: float, shared: Callable[[], None]) -> Iterator[None]:
    """Let fake tensors become sparse matrices.

    Args:
        share: how many of the numbers of a dense matrix are not zero, which its values would say.
        shared: called when one becomes a sparse matrix.
    """
    to_sparse, make = torch.Tensor.to_sparse_csr, torch.sparse_csr_tensor

    def converted(dense: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if not isinstance(dense, FakeTensor):
            return to_sparse(dense, *rest, **options)
        shared()
        count = round(share * dense.numel())
        rows, columns = (dense.new_empty(size, dtype=torch.long) for size in (dense.shape[0] + 1, count))
        return FakeSparse(rows, columns, dense.new_empty(count), dense.shape)

    def composed(rows: Any, columns: Any, values: Any, size: Any = None, **options: Any) -> Any:
        if not isinstance(values, FakeTensor):
            return make(rows, columns, values, size, **options)
        return FakeSparse(rows, columns, values, size)

    torch.Tensor.to_sparse_csr = converted  # type: ignore[method-assign, assignment]
    torch.sparse_csr_tensor = composed  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.Tensor.to_sparse_csr = to_sparse  # type: ignore[method-assign]
        torch.sparse_csr_tensor = make
