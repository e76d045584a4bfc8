"""Plug-ins that each break one point of the contract, and keep all others."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator

from membench.plugins import Context, HeldOut, LayerWise, QualityMetric, Step, Technique, Tokens, Workload, stepping
from membench.testing import Tiny, tiny_module

if TYPE_CHECKING:
    import torch
    from torch import nn


class DoublesItsOption(Technique):
    """Its option is another one each time it is read."""

    bits: int = Field(4)

    @field_validator("bits")
    @classmethod
    def _double(cls, bits: int) -> int:
        return 2 * bits


class Misspells(Technique):
    def aply(self, module: nn.Module, context: Context) -> nn.Module:
        return module


class HoldsALock(Technique):
    _lock: Any = PrivateAttr(default_factory=threading.Lock)


class _EachLinear(LayerWise):
    """Does something to each linear layer that is not the head."""

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        return self.changed(layer) if type(layer).__name__ == "Linear" and layer is not head else layer

    def changed(self, layer: Any) -> nn.Module:
        raise NotImplementedError


class DrawsFromNoSeed(_EachLinear):
    def changed(self, layer: Any) -> nn.Module:
        import torch

        random = torch.Generator()
        random.seed()
        layer.weight.data += 1e-3 * torch.randn(layer.weight.shape, generator=random)
        return layer  # type: ignore[no-any-return]


class MakesNoNumbers(_EachLinear):
    def changed(self, layer: Any) -> nn.Module:
        layer.weight.data.fill_(float("nan"))
        return layer  # type: ignore[no-any-return]


class _Halves(_EachLinear):
    """Weights in bfloat16, multiplied in the type of the input."""

    def changed(self, layer: Any) -> nn.Module:
        import torch

        def forward(x: torch.Tensor) -> torch.Tensor:
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)

        layer.weight.data = layer.weight.data.bfloat16()
        layer.forward = forward
        return layer  # type: ignore[no-any-return]


class ClaimsTooMuch(_Halves):
    def nominal_bits(self) -> float | None:
        return 8


class ClaimsNothing(_Halves):
    pass


class ClaimsStates(Technique):
    def nominal_state_bytes(self) -> float | None:
        return 2


class Hoards(_Halves):
    """Keeps what it has replaced."""

    kept: ClassVar[list[torch.Tensor]] = []

    def nominal_bits(self) -> float | None:
        return 16

    def changed(self, layer: Any) -> nn.Module:
        self.kept.append(layer.weight.data)
        return super().changed(layer)


class WantsFp32(_EachLinear):
    """Takes no weights that another technique has changed."""

    def changed(self, layer: Any) -> nn.Module:
        import torch

        if layer.weight.dtype != torch.float32:
            raise ValueError("these weights are not in fp32")
        return layer  # type: ignore[no-any-return]


class WantsToComeLast(_EachLinear):
    """Relies on weights staying in the type that they have when it sees them."""

    def changed(self, layer: Any) -> nn.Module:
        kind = layer.weight.dtype
        layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(kind),))
        return layer  # type: ignore[no-any-return]


class Disturbs(Technique):
    """Leaves something of the process in another way than it found it."""

    what: Literal["dtype", "threads", "grad", "torch", "python", "numpy", "variable", "deterministic", "attention"]

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import random

        import numpy
        import torch

        match self.what:
            case "dtype":
                torch.set_default_dtype(torch.float64)
            case "threads":
                torch.set_num_threads(torch.get_num_threads() + 1)
            case "grad":
                torch.set_grad_enabled(False)
            case "torch":
                torch.manual_seed(1)
            case "python":
                random.seed(1)
            case "numpy":
                numpy.random.seed(1)
            case "variable":
                os.environ["MEMBENCH_DISTURBED"] = "1"
            case "deterministic":
                torch.use_deterministic_algorithms(True)
            case "attention":
                torch.backends.cuda.enable_flash_sdp(False)
        return module


class BuildsFromNoSeed(Tiny):
    def build(self, context: Context) -> nn.Module:
        return tiny_module(int.from_bytes(os.urandom(4), "little"))


class KnowsTooMany(Tiny):
    def vocabulary(self, module: nn.Module) -> int:
        return 300


class TakesTooFew(Tiny):
    """Says that it takes 256 tokens, and takes 64."""

    def build(self, context: Context) -> nn.Module:
        def refuse(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            if inputs[0].shape[-1] > 64:
                raise IndexError("no position is left")

        module = super().build(context)
        module.register_forward_pre_hook(refuse)
        return module


class OutlinesAnother(Tiny):
    def skeleton(self) -> nn.Module:
        import torch
        from torch import nn

        with torch.device("meta"):
            return nn.Linear(3, 3)


class NeedsLittle(Tiny):
    def needed_bytes(self) -> int | None:
        return 1000


class DisturbsWhileBuilding(Tiny):
    def build(self, context: Context) -> nn.Module:
        os.environ["MEMBENCH_DISTURBED"] = "1"
        return super().build(context)


class Reads(Workload):
    """Reads 32 tokens a step, as it should."""

    def longest_sequence(self) -> int:
        return 16

    def tokens_per_step(self) -> int | None:
        return 32

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        ids = tokens(32).view(2, 16)

        def step() -> None:
            with torch.no_grad(), self.around(techniques, context):
                module(ids)
            self.after(module)

        return step

    def around(self, techniques: Sequence[Technique], context: Context) -> Any:
        return stepping(techniques, context)

    def after(self, module: nn.Module) -> None:
        """What it does besides."""


class ChangesFromNoSeed(Reads):
    """Trains, in a manner, by chance."""

    trains: ClassVar[bool] = True

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        from membench.builtin.workloads import training

        random = torch.Generator()
        random.seed()

        def next_batch() -> torch.Tensor:
            return torch.randint(0, 256, (2, 16), generator=random)

        def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return module(batch).float().logsumexp(-1).mean()  # type: ignore[no-any-return]

        return training.steps(module, next_batch, loss, "sgd", 1e-3, techniques, context)


class ChangesWeights(Reads):
    def after(self, module: nn.Module) -> None:
        next(module.parameters()).data += 1


class AsksNobody(Reads):
    def around(self, techniques: Sequence[Technique], context: Context) -> Any:
        return nullcontext()


class ReadsLonger(Reads):
    def longest_sequence(self) -> int:
        return 8


class ReadsFewer(Reads):
    def tokens_per_step(self) -> int | None:
        return 1000


class DisturbsWhileStepping(Reads):
    def after(self, module: nn.Module) -> None:
        os.environ["MEMBENCH_DISTURBED"] = "1"


class Constant(QualityMetric):
    """Keeps the contract of metrics."""

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        return float(held_out.logits(_ids(held_out)).mean())


class SaysNoNumber(QualityMetric):
    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        return float("nan")


class SaysAnything(QualityMetric):
    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        return float.fromhex(os.urandom(6).hex())


class WritesToTheModel(QualityMetric):
    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        next(module.parameters()).data += 1
        return 0.0


def _ids(held_out: HeldOut) -> torch.Tensor:
    import torch

    return torch.tensor(held_out.pieces[0])


class Conforming(_Halves):
    """Keeps the contract."""

    layers: tuple[str, ...] = ()

    def nominal_bits(self) -> float | None:
        return 16
