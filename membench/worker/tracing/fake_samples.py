"""Labelled samples without values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FakeSamples:
    """Samples of some width: batches (samples, features + 1) of zeros; see ``plugins.Samples``."""

    width: int
    classes: int
    kept_bytes: int = 0

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(size, self.width + 1)
