"""Allocations of known sizes, to compare with what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from membench.units import parse_bytes

if TYPE_CHECKING:
    import torch


def _touched(size: int | str, device: str) -> torch.Tensor:
    import torch

    return torch.ones(parse_bytes(size) if isinstance(size, str) else size, dtype=torch.uint8, device=device)


@contextmanager
def hold(size: int | str, device: str = "cpu") -> Iterator[torch.Tensor]:
    """Hold so many bytes, all of them touched, for as long as the block takes.

    Args:
        size: bytes, or text such as '8 MiB'.

    Yields:
        the tensor of them (uint8).
    """
    kept = [_touched(size, device)]
    try:
        yield kept[0]
    finally:
        kept.clear()


def burst(size: int | str, device: str = "cpu") -> None:
    """Allocate so many bytes, touch all of them, and let them go at once."""
    _touched(size, device)
