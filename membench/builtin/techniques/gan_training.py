"""Trains a conditional GAN on samples, and draws samples from its generator in int8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from membench.data.samples import StoredSamples

if TYPE_CHECKING:
    import torch
    from torch import nn

_BATCH = 128
_DISCRIMINATOR_HIDDEN = 128
_GENERATOR_RATE, _DISCRIMINATOR_RATE = 4e-3, 4e-3
_BETAS = (0.0, 0.9)
_NOISE = 0.03
_AVERAGE = 0.995


class Int8Layer(NamedTuple):
    """A linear layer of a generator: a byte a weight, and for each output a scale and a bias in float16."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Layer:
        """Rounded to the nearest of 255 levels of each output's own largest weight."""
        import torch

        weight = layer.weight.detach().cpu()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(rounded, scale, layer.bias.detach().cpu().half())

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias in fp32."""
        return self.weight.float() * self.scale.float()[:, None], self.bias.float()


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples that a generator makes as they are asked for; it alone is kept.

    Attributes:
        layers: of the generator.
        shares: of each class in what it was trained on, fp32; samples are drawn by them.
    """

    layers: tuple[Int8Layer, ...]
    shares: torch.Tensor

    @property
    def width(self) -> int:
        return len(self.layers[-1].bias)

    @property
    def classes(self) -> int:
        return len(self.shares)

    @property
    def kept_bytes(self) -> int:
        return self.shares.nbytes + sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        import torch

        from membench.builtin.layers.conditional_gan import generated

        random = torch.Generator().manual_seed(seed)
        latent = self.layers[0].weight.shape[1] - self.classes
        while True:
            labels = torch.multinomial(self.shares, size, replacement=True, generator=random)
            noise = torch.randn(size, latent, generator=random)
            made = generated(noise, labels, self.classes, [layer.numbers() for layer in self.layers])
            yield torch.cat([made, labels[:, None].float()], dim=1)


def trained(samples: StoredSamples, latent: int, hidden: int, steps: int, seed: int, device: str) -> GeneratedSamples:
    """A generator of samples like these.

    Hinge loss (Lim and Ye, 2017, arXiv:1705.02894), one step of the generator for each of the discriminator, a little
    noise on all that the discriminator sees, and the running average of the generator (Yazıcı et al., 2018,
    arXiv:1806.04498). Nothing else that is random in the process is touched.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(samples, latent, hidden, steps, seed, device)


def _trained(samples: StoredSamples, latent: int, hidden: int, steps: int, seed: int, device: str) -> GeneratedSamples:
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from membench.builtin.layers.conditional_gan import Discriminator, Generator

    generator = Generator(latent, samples.classes, hidden, samples.width).to(device)
    discriminator = Discriminator(samples.width, samples.classes, _DISCRIMINATOR_HIDDEN).to(device)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE))
    of_generator = torch.optim.Adam(generator.parameters(), _GENERATOR_RATE, _BETAS, fused=True)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), _DISCRIMINATOR_RATE, _BETAS, fused=True)
    batches = samples.batches(_BATCH, seed)

    def seen(some: torch.Tensor) -> torch.Tensor:
        return some + _NOISE * torch.randn(some.shape).to(device)

    for _ in range(steps):
        batch = next(batches).to(device)
        real, labels = batch[:, :-1], batch[:, -1].long()
        made = generator(torch.randn(len(labels), latent).to(device), labels)
        scores = discriminator(seen(torch.cat([real, made.detach()])), labels.repeat(2))
        of_real, of_made = scores.chunk(2)
        of_discriminator.zero_grad()
        (torch.relu(1 - of_real).mean() + torch.relu(1 + of_made).mean()).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        (-discriminator(seen(made), labels).mean()).backward()
        of_generator.step()
        average.update_parameters(generator)
    averaged = average.module
    assert isinstance(averaged, Generator)
    shares = torch.bincount(torch.from_numpy(samples.labels).long(), minlength=samples.classes) / len(samples.labels)
    return GeneratedSamples(tuple(Int8Layer.of(layer) for layer in averaged.layers()), shares)
