"""The English text that every CPython carries, as training text, held-out text and token ids."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from array import array
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@functools.cache
def split() -> tuple[bytes, bytes]:
    """(training, held-out) text. Paragraphs go by their own hash, so none stands in both."""
    from pydoc_data import topics

    paragraphs = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).split("\n\n")
    train: list[str] = []
    held_out: dict[str, None] = {}
    for paragraph in filter(str.strip, paragraphs):
        if hashlib.sha256(paragraph.strip().encode()).digest()[0] < 13:
            held_out[paragraph.strip()] = None
        else:
            train.append(paragraph)
    return "\n\n".join(train).encode(), "\n\n".join(held_out).encode()


def digest() -> str:
    """A hash of the whole text: it differs between Python versions, and figures with it."""
    return hashlib.sha256(b"\0".join(split())).hexdigest()[:16]


@functools.cache
def _word_ranks() -> array[int]:
    """The training text as words, each by its rank of frequency."""
    words = re.findall(r"\w+|[^\w\s]|\s+", split()[0].decode(errors="replace"))
    rank = {word: number for number, (word, _) in enumerate(Counter(words).most_common())}
    return array("I", map(rank.__getitem__, words))


def read() -> None:
    """Read and split the text now, so that it is there before something is measured."""
    split()
    _word_ranks()


def tokens(vocabulary: int, count: int) -> list[int]:
    """``count`` token ids of the training text: bytes where the vocabulary is of bytes, else words by their rank."""
    source = split()[0] if vocabulary <= 256 else _word_ranks()
    ids = [token % vocabulary for token in source[:count]]
    return (ids * (count // len(ids) + 1))[:count]


def bits_per_byte(module: nn.Module, device: str) -> float:
    """Mean bits per byte of the held-out text under a byte-level model, in pieces of 256 bytes."""
    import torch

    data = torch.tensor(list(split()[1]), dtype=torch.long, device=device)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data) - 1, 256):
            piece = data[start : start + 257]
            # Half-precision losses would shift more than the quantization that is measured.
            logits = module(piece[None, :-1]).logits[0].float()
            total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    return total / count / math.log(2)
