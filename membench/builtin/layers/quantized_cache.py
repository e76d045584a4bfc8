"""A key-value cache whose layers keep integers of 8 or 4 bits and scales.

Shapes: B sequences, H key-value heads, T tokens, D numbers a head, G groups of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_SMALLEST_SCALE = 2.0**-24  # of float16


@dataclass
class Quantized:
    """Keys or values (B, H, T, D) as integers and, for each group of a token's head, a scale.

    Attributes:
        integers: 8 bits: (B, H, T, D), int8. 4 bits: (B, H, T, D / 2), uint8: the head's first half in the low bits.
        scale: (B, H, T, G), float16.
        lowest: what integer 0 stands for, (B, H, T, G), float16; ``None`` for 8 bits, where it is 0.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    lowest: torch.Tensor | None

    @classmethod
    def of(cls, numbers: torch.Tensor, bits: int, group_size: int) -> Quantized:
        """Round numbers (B, H, T, D) to 8 or 4 bits. Each token by itself: none is ever rounded again."""
        groups = numbers.float().unflatten(-1, (-1, group_size))
        if bits == 8:
            scale = _scale(groups.abs().amax(-1) / 127)
            integers = (groups / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8)
            return cls(integers.flatten(-2), scale, None)
        lowest, highest = groups.aminmax(dim=-1)
        scale, lowest = _scale((highest - lowest) / 15), lowest.half()
        codes = (groups - lowest.float()[..., None]).div_(scale.float()[..., None]).round_().clamp_(0, 15)
        low, high = codes.to(torch.uint8).flatten(-2).chunk(2, -1)
        return cls(low | (high << 4), scale, lowest)

    def numbers(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers (B, H, T, D) that the integers stand for."""
        codes = self.integers
        if self.lowest is not None:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        groups = codes.to(dtype).unflatten(-1, (self.scale.shape[-1], -1)).mul_(self.scale.to(dtype)[..., None])
        if self.lowest is not None:
            groups.add_(self.lowest.to(dtype)[..., None])
        return groups.flatten(-2)

    def followed_by(self, later: Quantized) -> Quantized:
        """Both, one after the other in time."""
        lowest = None
        if self.lowest is not None and later.lowest is not None:
            lowest = torch.cat([self.lowest, later.lowest], dim=-2)
        integers = torch.cat([self.integers, later.integers], dim=-2)
        return Quantized(integers, torch.cat([self.scale, later.scale], dim=-2), lowest)


def _scale(wanted: torch.Tensor) -> torch.Tensor:
    return wanted.clamp_(min=_SMALLEST_SCALE).half()


class _Kept:
    """Keys or values: the newest ``residual_length`` tokens as they came, all older ones quantized."""

    def __init__(self, bits: int, group_size: int, residual_length: int) -> None:
        self._bits, self._group_size, self._residual_length = bits, group_size, residual_length
        self._older: Quantized | None = None
        self._newest: torch.Tensor | None = None

    def __len__(self) -> int:
        older = 0 if self._older is None else self._older.scale.shape[-2]
        return older + (0 if self._newest is None else self._newest.shape[-2])

    def extended(self, new: torch.Tensor) -> torch.Tensor:
        """Take tokens in, and give all there are (B, H, T, D) as attention is to see them: the older ones rounded."""
        newest = new if self._newest is None else torch.cat([self._newest, new], dim=-2)
        ripe = newest.shape[-2] - self._residual_length
        if ripe > 0:
            quantized = Quantized.of(newest[..., :ripe, :], self._bits, self._group_size or newest.shape[-1])
            self._older = quantized if self._older is None else self._older.followed_by(quantized)
            newest = newest[..., ripe:, :]
        # A copy: these may be views, which would hold on to the whole of what they are cut from.
        self._newest = newest.clone(memory_format=torch.contiguous_format)
        if self._older is None:
            return self._newest
        older = self._older.numbers(new.dtype)
        return torch.cat([older, self._newest], dim=-2) if self._residual_length else older


class QuantizedLayer(CacheLayerMixin):
    """A layer's keys and values, in the form transformers asks for."""

    def __init__(self, bits: int, group_size: int, residual_length: int) -> None:
        super().__init__()
        self._keys = _Kept(bits, group_size, residual_length)
        self._values = _Kept(bits, group_size, residual_length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_initialized = True
        return self._keys.extended(key_states), self._values.extended(value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return len(self._keys)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        raise NotImplementedError("a quantized cache serves one generation")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("a quantized cache serves greedy generation, not beam search")


def quantized_cache(bits: int, group_size: int | None, residual_length: int) -> Cache:
    """A cache of 8 or 4 bits for one generation.

    Args:
        group_size: numbers of a token's head that share a scale; ``None``: all of them.
        residual_length: how many of the newest tokens stay as they came.
    """
    layer = functools.partial(QuantizedLayer, bits, group_size or 0, residual_length)
    return Cache(layer_class_to_replicate=layer)
