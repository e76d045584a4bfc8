"""Layers whose weights are integers of 2 to 8 bits, packed without gaps, and scales.

Codes are cut into pieces of 8, 4, 2 and 1 bits (7 = 4 + 2 + 1), and pieces of a width fill bytes of their own: every
number of bits is kept in as many, and unpacking takes a shift and a mask a piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_WIDTHS = (8, 4, 2, 1)
_RUN_OF_WEIGHTS = 2**16


def runs_of_rows(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A matrix in runs of some 65,536 weights, so that what is made of each meanwhile is small."""
    return weight.split(max(1, _RUN_OF_WEIGHTS // weight.shape[1]))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, columns), uint8 below 2^bits, as (rows, ⌈columns / 8⌉ · bits) bytes."""
    rows, columns = codes.shape
    codes = nn.functional.pad(codes, (0, -columns % 8))
    pieces = []
    remaining = bits
    for width in _WIDTHS:
        if bits & width:
            remaining -= width
            piece = ((codes >> remaining) & (2**width - 1)).view(rows, -1, 8 // width)
            pieces.append((piece << _shifts(width, codes.device)).sum(-1, dtype=torch.uint8))
    return torch.cat(pieces, dim=1)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """What ``pack`` was given: (rows, columns), uint8."""
    padded = columns + -columns % 8
    widths = [width for width in _WIDTHS if bits & width]
    codes: torch.Tensor | None = None
    for width, piece in zip(widths, packed.split([padded * width // 8 for width in widths], dim=1), strict=True):
        if width < 8:
            piece = ((piece[:, :, None] >> _shifts(width, packed.device)) & (2**width - 1)).flatten(1)
        codes = piece if codes is None else (codes << width) | piece
    assert codes is not None
    return codes[:, :columns]


def _shifts(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


class PackedWeight(nn.Module):
    """A matrix (rows, columns) of integers from -2^(bits - 1) to 2^(bits - 1) - 1, times scales.

    Args:
        runs: of its rows one after the other, int8. Each is packed as it comes, so that no more than one need be there.
        shape: rows and columns.
        scale: (rows, groups of a row), or (1, 1) for a scale of the whole; of the type that the weight had.
    """

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, runs: Iterable[torch.Tensor], shape: tuple[int, int], scale: torch.Tensor, bits: int) -> None:
        super().__init__()
        rows, self.columns = shape
        self.bits = bits
        packed = torch.empty(rows, -(-self.columns // 8) * bits, dtype=torch.uint8, device=scale.device)
        first = 0
        for integers in runs:
            # In unsigned bytes the sum wraps around, so that -2^(bits - 1) becomes code 0.
            packed[first : first + len(integers)] = pack(integers.view(torch.uint8) + self._lowest, bits)
            first += len(integers)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @property
    def _lowest(self) -> int:
        return 2 ** (self.bits - 1)

    def integers(self, packed: torch.Tensor | None = None) -> torch.Tensor:
        """The integers, int8, of all rows or of the packed ones given."""
        codes = unpack(self.packed if packed is None else packed, self.bits, self.columns)
        return (codes - self._lowest).view(torch.int8)

    def dequantized(self) -> torch.Tensor:
        """The weight (rows, columns), in the scales' type."""
        return _scaled(self.integers(), self.scale)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows (N, columns) of these numbers (N,); no others are unpacked."""
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[ids]
        return _scaled(self.integers(self.packed[ids]), scale)

    def part(self, position: int, parts: int) -> torch.Tensor:
        """One of as many equal parts of the rows; no others are unpacked."""
        packed = self.packed.chunk(parts)[position]
        scale = self.scale if self.scale.shape[0] == 1 else self.scale.chunk(parts)[position]
        return _scaled(self.integers(packed), scale)

    def extra_repr(self) -> str:
        return f"rows={self.packed.shape[0]}, columns={self.columns}, bits={self.bits}, scales={self.scale.numel()}"


def _scaled(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = integers.to(scale.dtype).view(integers.shape[0], scale.shape[1], -1)
    return values.mul_(scale[:, :, None]).flatten(1)


class PackedLinear(nn.Linear):
    """A linear layer that unpacks its weight for each pass and keeps no copy of it, for the backward pass neither."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = packed.columns, packed.packed.shape[0]
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)
        self.packed = packed

    @property
    def qweight(self) -> torch.Tensor:
        """The packed bytes, by the name under which peft looks for a quantized layer's device."""
        return self.packed.packed

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Product.apply(inputs, self.packed, self.bias)


class PackedEmbedding(nn.Module):
    """An embedding that unpacks the rows it is asked for."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed.rows(ids.flatten()).view(*ids.shape, -1)


class _Product(torch.autograd.Function):
    """inputs · weightᵀ + bias. Autograd would keep the unpacked weight for the backward pass; this unpacks it again."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.packed = packed
        return nn.functional.linear(inputs, packed.dequantized().to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        (gradient,) = gradients
        of_inputs = gradient @ ctx.packed.dequantized().to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_inputs, None, of_bias
