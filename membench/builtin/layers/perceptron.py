"""A perceptron of one hidden layer."""

from __future__ import annotations

import torch
from torch import nn


class Perceptron(nn.Sequential):
    """Features (B, width) to logits (B, classes); features come in the type of the weights."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        types = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        logits: torch.Tensor = super().forward(features.to(next(types, features.dtype)))
        return logits
