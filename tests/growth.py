"""A network of known amounts, and a technique that makes one of them grow. Registered by the tests alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from membench.plugins import Context, Model, Technique, TrainingStep

if TYPE_CHECKING:
    import torch
    from torch import nn

MIB = 2**20


class Net(Model):
    """An embedding of 256 tokens, some square layers and a head; weights in fp32, without biases."""

    gives_logits: ClassVar[bool] = False
    width: int = 512
    layers: int = 4

    def build(self, context: Context) -> nn.Module:
        from torch import nn

        layers = [nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers)]
        embedding, head = nn.Embedding(256, self.width), nn.Linear(self.width, 256, bias=False)
        return nn.Sequential(embedding, nn.Sequential(*layers), head)

    def vocabulary(self, module: nn.Module) -> int:
        return 256


class Grows(Technique):
    """Takes so much more of one thing."""

    what: Literal["nothing", "weights", "optimizer", "activations", "load", "time"] = "nothing"
    more_bytes: int = 0
    pause_s: float = 0.0

    def load(self, build: Callable[[], nn.Module], rest: Sequence[Technique], context: Context) -> nn.Module:
        import torch

        module = build()
        if self.what == "load":
            torch.ones(self.more_bytes // 4)
        return module

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        if self.what == "weights":
            module.get_submodule("1.2").register_buffer("spare", torch.ones(self.more_bytes // 4))
        if self.what == "activations":
            module.get_submodule("1.2").register_forward_hook(lambda _, inputs, output: self._keep(output))
        return module

    def _keep(self, output: torch.Tensor) -> torch.Tensor:
        """``output``, with so much more kept for the backward pass."""
        import torch

        class Keeping(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, kept: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(spare)
                return kept.clone()

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
                return gradient, None

        kept: torch.Tensor = Keeping.apply(output, torch.ones(self.more_bytes // 4))  # type: ignore[no-untyped-call]
        return kept

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        import torch

        if self.what == "optimizer":
            first = next(iter(module.parameters()))
            spare = torch.ones(self.more_bytes // 4)
            optimizer.register_step_post_hook(lambda own, *_: own.state[first].setdefault("spare", spare))
        return optimizer

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        plain = step.step

        def slow() -> None:
            ends = time.perf_counter() + self.pause_s  # however long what is done meanwhile takes
            plain()
            time.sleep(max(0.0, ends - time.perf_counter()))

        if self.pause_s:
            step.step = slow
        return step
