"""A generator of samples of a class, and the discriminator that it is trained against."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

_SLOPE = 0.2


class Generator(nn.Module):
    """Noise (B, latent) and classes (B,) to samples (B, width) between 0 and 1: three linear layers."""

    def __init__(self, latent: int, classes: int, hidden: int, width: int) -> None:
        super().__init__()
        self.latent, self.classes = latent, classes
        self.first, self.second = nn.Linear(latent + classes, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, width)

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return generated(noise, labels, self.classes, [(layer.weight, layer.bias) for layer in self.layers()])

    def layers(self) -> tuple[nn.Linear, ...]:
        return self.first, self.second, self.last


def generated(
    noise: torch.Tensor, labels: torch.Tensor, classes: int, layers: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """What a generator of these weights and biases makes."""
    values = torch.cat([noise, nn.functional.one_hot(labels, classes).to(noise.dtype)], dim=1)
    for weight, bias in layers[:-1]:
        values = nn.functional.leaky_relu(nn.functional.linear(values, weight, bias), _SLOPE)
    return torch.sigmoid(nn.functional.linear(values, *layers[-1]))


class Discriminator(nn.Module):
    """Samples (B, width) and classes (B,) to scores (B,): w·f(x) + b + e(class)·f(x), every layer of spectral norm 1.

    The projection discriminator of Miyato and Koyama, 2018 (arXiv:1802.05637); spectral normalization of Miyato et
    al., 2018 (arXiv:1802.05957).
    """

    def __init__(self, width: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            spectral_norm(nn.Linear(width, hidden)),
            nn.LeakyReLU(_SLOPE),
            spectral_norm(nn.Linear(hidden, hidden)),
            nn.LeakyReLU(_SLOPE),
        )
        self.score = spectral_norm(nn.Linear(hidden, 1))
        self.of_class = spectral_norm(nn.Embedding(classes, hidden))

    def forward(self, samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features = self.features(samples)
        score: torch.Tensor = self.score(features).squeeze(1) + (self.of_class(labels) * features).sum(1)
        return score
