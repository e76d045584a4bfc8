"""Models as people write them: layers with a forward or hooks of their own, and code that reads ``layer.weight``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH = 64


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 4 + x


class Squared(nn.Linear):
    """Computes with its weight itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * self.weight.abs(), self.bias)


class Initialised(nn.Linear):
    """Nothing but other first values."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Reading(nn.Module):
    """A mixer that takes the weight of its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.proj.weight, self.proj.bias)


class Multiplying(Reading):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.proj.weight.t().contiguous()


class Casting(Reading):
    """Asks for the type alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x.to(self.proj.weight.dtype))
        return y


class Helped(Reading):
    """Reads it in a function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.proj)


def _product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return torch.einsum("bti,oi->bto", x, layer.weight)


class Direct(Reading):
    """Calls the layer's forward without its hooks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj.forward(x)


class LateReading(Reading):
    """Reads it for long sequences alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < 16:
            y: torch.Tensor = self.proj(x)
            return y
        return functional.linear(x, self.proj.weight, self.proj.bias)


class Convolving(nn.Module):
    """A layer of torch's whose operation is no product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x.transpose(1, 2))
        return y.transpose(1, 2)


class Net(nn.Module):
    """Token ids (B, T) to logits (B, T, 256)."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(256, WIDTH), mix, nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.mix(self.embed(ids)))
        return logits


class Tied(Net):
    """The head is the table, and the model does not say so."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH))
        self.head.weight = self.embed.weight


def plain() -> nn.Module:
    return Net(nn.Linear(WIDTH, WIDTH))


def scaled() -> nn.Module:
    return Net(Scaled(WIDTH, WIDTH))


def squared() -> nn.Module:
    return Net(Squared(WIDTH, WIDTH))


def initialised() -> nn.Module:
    return Net(Initialised(WIDTH, WIDTH))


def hooked() -> nn.Module:
    net = Net(nn.Linear(WIDTH, WIDTH))
    net.mix.register_forward_hook(lambda layer, inputs, output: output * 4 + inputs[0])
    return net


def pre_hooked() -> nn.Module:
    net = Net(nn.Linear(WIDTH, WIDTH))
    net.mix.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 3,))
    return net


def exchanged() -> nn.Module:
    net = Net(nn.Linear(WIDTH, WIDTH))
    layer: Any = net.mix
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 4 + x
    return net


def parametrized() -> nn.Module:
    from torch.nn.utils import parametrizations

    return Net(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


def reading() -> nn.Module:
    return Net(Reading())


def multiplying() -> nn.Module:
    return Net(Multiplying())


def casting() -> nn.Module:
    return Net(Casting())


def helped() -> nn.Module:
    return Net(Helped())


def direct() -> nn.Module:
    return Net(Direct())


def convolving() -> nn.Module:
    return Net(Convolving())


def late() -> nn.Module:
    return Net(LateReading())


def tied() -> nn.Module:
    return Tied()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 128, batch_first=True)
    return Net(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


def blocks() -> nn.Module:
    return Net(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))


def shared() -> nn.Module:
    """One layer in two places."""
    mix = nn.Linear(WIDTH, WIDTH)
    return Net(nn.Sequential(mix, nn.ReLU(), mix))


def not_without_data() -> nn.Module:
    """As ``reading``, but it cannot be made on the meta device."""
    made = Net(Reading())
    made.embed.weight.detach().sum().item()
    return made


def _with_buffers(**buffers: torch.Tensor) -> nn.Module:
    net = plain()
    for name, buffer in buffers.items():
        net.register_buffer(name, buffer)
    return net


def views() -> nn.Module:
    whole = torch.arange(4096.0).view(64, 64)
    return _with_buffers(first=whole[:10], second=whole[5:20])


def expanded() -> nn.Module:
    return _with_buffers(mask=torch.arange(64.0).view(1, 64, 1).expand(4096, 64, 64))


def sparse() -> nn.Module:
    return _with_buffers(eye=torch.eye(64).to_sparse_csr())
