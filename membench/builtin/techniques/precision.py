"""Weights in half precision, and half precision for the arithmetic alone."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from membench.host.device import Device
from membench.plugins import Context, LayerWise, Setting, Technique, TrainingStep, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Cast(LayerWise):
    """Casts each layer's own parameters and buffers; buffers of layers without parameters (rotary angles) stay fp32."""

    acts_on: ClassVar[str] = "weights, activations, gradients, optimizer, cache"
    keeps_layers: ClassVar[bool] = True
    dtype: ClassVar[str]

    def refuse(self, setting: Setting) -> str | None:
        cast = next((t.dtype for t in setting.before if isinstance(t, _Cast) and t.dtype != self.dtype), None)
        return f"the weights are cast already, to {cast}" if cast else None

    def nominal_bits(self) -> float | None:
        return 16

    def convert(self, name: str, layer: nn.Module, head: nn.Module | None) -> nn.Module:
        import torch

        dtype = getattr(torch, self.dtype)
        return layer._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)


class Bf16(_Cast):
    """Weights and activations in bfloat16: 2 bytes a weight, fp32's range, 8 bits of precision.

    A training keeps gradients and AdamW's states in bfloat16 too. It does not diverge, but a step below 1/512 of its
    weight is rounded away: near the end of a training most steps are. ``adamw-bf16-stochastic-rounding`` and
    ``master-weights`` are the two remedies. On a CPU oneDNN compiles a kernel for each shape of matrix product and
    keeps it: some 10 MiB of live memory that do not grow with the model.
    """

    dtype = "bfloat16"


class Fp16(_Cast):
    """Weights and activations in float16: 2 bytes a weight, 11 bits of precision, overflows above 65,504.

    Fit to run a model, not to train it: AdamW's states are in float16 too. Of a gradient g the first step's state takes
    (1 - β₂)·g², with β₂ = 0.999, which is zero there for g below about 5.5e-3, and so is AdamW's ε of 1e-8. The update
    then divides by zero, and the training ends as ``diverged`` after a step or two. ``autocast-fp16`` keeps weights and
    states in fp32 and scales the loss. On a CPU without float16 instructions it is several times slower than fp32.
    """

    dtype = "float16"


class _Autocast(Technique):
    acts_on: ClassVar[str] = "activations, time"
    dtype: ClassVar[str]

    def computing_bits(self) -> float | None:
        return 16

    def step_context(self, context: Context) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(_device_type(context), dtype=getattr(torch, self.dtype))


class AutocastBf16(_Autocast):
    """Matrix products in bfloat16 and losses in fp32, the weights left in fp32 (torch.autocast).

    torch has a list for each kind of device of the operations that run in 16 bits, and of those that run in fp32;
    softmax is in the second on a GPU alone. Gradients and optimizer states stay fp32. Every weight that a matrix
    product uses is cast once a forward pass, and the copy is kept till its end, in training till it went backward: 2
    bytes a weight on top of fp32's 4. So memory falls only where activations outweigh these copies; the key-value
    cache of a model that rotates its keys stays fp32. What is won is time, on hardware that has bfloat16. Source: https://docs.pytorch.org/docs/stable/amp.html.
    """

    dtype = "bfloat16"


class AutocastFp16(_Autocast):
    """Matrix products in float16, weights left in fp32 (torch.autocast); training scales its gradients.

    As ``autocast-bf16``, but float16 ends at 6e-8 below and 65,504 above. In training the loss is therefore multiplied
    by a scale, at first 65,536, before the backward pass, and the gradients are divided by it before the optimizer's
    step (torch.amp.GradScaler; Micikevicius et al., 2018, arXiv:1710.03740). A step whose gradients are not finite is
    left out and the scale halved; after 2,000 good steps it is doubled. Scaling needs weights, and so gradients, in
    fp32 or bf16, and all gradients at once. On a CPU without float16 instructions it is many times slower than fp32.
    """

    needs_all_gradients: ClassVar[bool] = True
    dtype = "float16"
    _module: weakref.ref[nn.Module] | None = PrivateAttr(None)
    _count: _Count | None = PrivateAttr(None)

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        import torch

        if any(parameter.dtype == torch.float16 for parameter in module.parameters() if parameter.requires_grad):
            raise Unsuitable(
                "gradients of float16 weights cannot be scaled back: scaling needs weights in fp32 or bf16"
            )
        # Weakly: the technique outlives the rehearsal, of whose module and optimizer nothing must stay.
        self._module = weakref.ref(module)
        return optimizer

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        assert self._module is not None
        self._count = _Count()
        steps = _ScaledSteps(self._module, step.step, _device_type(context), self._count)
        return dataclasses.replace(step, backward=lambda loss: step.backward(steps.scaled(loss)), step=steps.take)

    def remark(self, module: nn.Module, context: Context) -> str | None:
        count = self._count
        if count is None or count.tried == count.taken:
            return None
        left_out = count.tried - count.taken
        return f"left out {left_out} of the first {count.tried} training steps: the scaled gradients overflowed"


@dataclasses.dataclass
class _Count:
    """Steps that gradients were there for, and those that were taken."""

    tried: int = 0
    taken: int = 0


class _ScaledSteps:
    """Scales losses, and takes the step only if the gradients are finite once they are scaled back.

    It stands in for the optimizer before the gradient scaler, which looks at ``param_groups`` and may call ``step``:
    the workload's optimizer may come from a later member of the stack.
    """

    def __init__(
        self, module: weakref.ref[nn.Module], step: Callable[[], None], device_type: str, count: _Count
    ) -> None:
        import torch

        self._module = module
        self._step = step
        self._scaler: Any = torch.amp.GradScaler(device_type)
        self._count = count

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        module = self._module()
        assert module is not None
        return [{"params": list(module.parameters())}]

    def step(self) -> None:
        self._count.taken += 1
        self._step()

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self._scaler.scale(loss)
        return scaled

    def take(self) -> None:
        self._count.tried += 1
        self._scaler.step(self)
        self._scaler.update()


def _device_type(context: Context) -> str:
    return Device.parse(context.device).kind
