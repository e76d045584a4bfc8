"""Decoders in plain torch, by no convention: token ids (B, T) below 96 to logits (B, T, 96)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 96


class Encoder(nn.Module):
    """torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 56, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.encoder(self.table(ids)))


class Block(nn.Module):
    """Attention of four heads and a gated network of 24 channels, whose parts have names of their own."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.gate, self.wide, self.back = nn.Linear(32, 24), nn.Linear(32, 24), nn.Linear(24, 32)
        self.ask, self.tell, self.say, self.gather = (nn.Linear(32, 32) for _ in range(4))
        self.softmax = softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.ask, self.tell, self.say)]
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.gather(mixed.transpose(1, 2).flatten(-2))
        gates = self.gate(x).softmax(-1) if self.softmax else self.gate(x).sigmoid()
        y: torch.Tensor = x + self.back(gates * self.wide(x))
        return y


class Towers(nn.Module):
    """Two lists of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.first, self.second = (nn.ModuleList(Block(False) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for block in (*self.first, *self.second):
            x = block(x)
        return self.head(x)


class TwoModalities(Towers):
    """Whose second list of layers is for pictures."""

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.table(ids)
        for block in self.first:
            x = block(x)
        return self.head(x)


def encoder() -> nn.Module:
    return Encoder()


def blocks() -> nn.Module:
    """Blocks among other modules in one Sequential."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), *(Block(False) for _ in range(4)), nn.Linear(32, VOCABULARY))


def blocks_with_a_softmax() -> nn.Module:
    """Where a channel depends on all others."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 32), *(Block(True) for _ in range(4)), nn.Linear(32, VOCABULARY))


def blocks_of_shared_weights() -> nn.Module:
    module: Any = blocks()
    module[2].gate.weight = module[1].gate.weight
    shared: nn.Module = module
    return shared


def towers() -> nn.Module:
    return Towers()


def two_modalities() -> nn.Module:
    return TwoModalities()
