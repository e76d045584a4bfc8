"""Optimizers that keep less between steps than AdamW's 8 bytes a parameter, and some to compare them with."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.techniques.master_weights import adamw_with_master_weights
from membench.builtin.techniques.precision import Bf16
from membench.host.device import Device
from membench.plugins import Context, Parallel, Setting, Technique, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


class OptimizerTechnique(Technique):
    """Takes the place of the workload's optimizer: the same parameters, and its learning rate."""

    acts_on: ClassVar[str] = "optimizer"

    state_bytes: ClassVar[float | None] = None
    """As ``nominal_state_bytes``."""

    def nominal_state_bytes(self) -> float | None:
        return self.state_bytes

    def refuse(self, setting: Setting) -> str | None:
        if not setting.workload.trains:
            return "an optimizer needs a workload that trains"
        if any(isinstance(other, OptimizerTechnique) for other in (*setting.before, *setting.after)):
            return "a training has one optimizer, and the stack names two"
        return None

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return self.make(parameters, optimizer.param_groups[0]["lr"], context)

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        raise NotImplementedError


class AdamWFused(OptimizerTechnique):
    """AdamW whose step is one kernel, without temporaries: the states are the same, and so is the result to rounding.

    On a GPU torch's default steps through all tensors at once (``foreach``), with one more copy of the second moments
    while it does. Where the step is the peak of the training, that copy is saved. On a CPU the default takes one tensor
    after the other, and what is saved is small.

    Source: torch.optim.AdamW, ``fused``.
    """

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(parameters, lr=learning_rate, fused=True)


class _TorchaoAdamW(OptimizerTechnique):
    imports = ("torch", "torchao.optim")
    kind: ClassVar[str]
    settings: ClassVar[dict[str, Any]]

    def refuse(self, setting: Setting) -> str | None:
        return super().refuse(setting) or missing_compiler(setting.device)

    def computing_bits(self) -> float | None:
        assert self.state_bytes is not None
        return 8 * self.state_bytes / 2  # two moments

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, self.kind)(parameters, lr=learning_rate, **self.settings)


class AdamW8bit(_TorchaoAdamW):
    """AdamW with both moments in 8 bits: 2.03 bytes a parameter instead of 8 (torchao).

    Each block of 256 values has an fp32 scale and 8-bit codes into a table of values that lie denser near zero
    (dynamic quantization; Dettmers et al., 2021, arXiv:2110.02861). The step itself is computed in fp32. Tensors of
    fewer than 4,096 values, or that the block does not divide, keep fp32 moments. torchao compiles a kernel for each
    shape of tensor at the first step, 10 to 30 s on a CPU when its cache is empty: in ``warmup``, not in timed steps.
    It needs a compiler. What compiling leaves in memory is counted: some 6 MiB, or 12 where the cache did not have the
    kernels yet. While a tensor is stepped, the CPU's kernel holds 9 bytes for each of its values.
    """

    kind = "AdamW8bit"
    state_bytes = 2
    settings: ClassVar[dict[str, Any]] = {"block_size": 256}


class AdamW4bit(_TorchaoAdamW):
    """AdamW with both moments in 4 bits: 1.06 bytes a parameter instead of 8 (torchao).

    Each block of 128 values has an fp32 scale and two codes a byte, of a dynamic table for the first moment and of an
    even one without zero for the second (Li et al., 2023, arXiv:2309.01507, without their rank-1 scales). The step is
    computed in fp32. What stays fp32, compiling and its costs are as with ``adamw-8bit``, but for what the CPU's kernel
    holds while a tensor is stepped: 27 bytes for each of its values. Where one tensor is a large share of the model, an
    embedding of a small one, the peak is higher than with fp32 states.
    """

    kind = "AdamW4bit"
    state_bytes = 1
    settings: ClassVar[dict[str, Any]] = {"block_size": 128}


class AdamWFp8(_TorchaoAdamW):
    """AdamW with both moments in float8 (e4m3): 2.03 bytes a parameter instead of 8 (torchao).

    Each block of 256 values has an fp32 scale that brings its largest to float8's, 448. The step is computed in fp32.
    A GPU needs compute capability 8.9. What stays fp32, compiling and its costs are as with ``adamw-8bit``.
    """

    kind = "AdamWFp8"
    state_bytes = 2
    settings: ClassVar[dict[str, Any]] = {"block_size": 256}

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        import torch

        if Device.parse(context.device).on_gpu:
            capability = torch.cuda.get_device_capability(context.device)
            if capability < (8, 9):
                raise Unsuitable(f"float8 needs compute capability 8.9; this GPU has {capability[0]}.{capability[1]}")
        return super().make(parameters, learning_rate, context)


class AdamWBf16StochasticRounding(_TorchaoAdamW, Bf16):
    """A bf16 model whose AdamW rounds each new weight up or down by chance: 4 bytes of moments a parameter (torchao).

    A value x between two bf16 neighbours, a ≤ x < b, becomes b with probability (x − a) / (b − a): its mean is x, and
    steps smaller than bf16's spacing add up, where rounding to nearest would lose each one (Zamirai et al., 2020,
    arXiv:2010.06192). No fp32 copy is needed: with weights and gradients 8 bytes a parameter instead of 16. Moments
    are bf16, rounded to nearest. Compiling and its costs are as with ``adamw-8bit``.
    """

    acts_on: ClassVar[str] = Bf16.acts_on
    kind = "_AdamW"
    state_bytes = 4
    settings: ClassVar[dict[str, Any]] = {"bf16_stochastic_round": True}


class MasterWeights(OptimizerTechnique, Bf16):
    """A bf16 model with an fp32 copy of its weights, and fp32 moments, in AdamW: the classic mixed precision.

    Micikevicius et al., 2018 (arXiv:1710.03740), with bf16, which needs no loss scale. The copy starts from the bf16
    weights; the gradient, bf16, is applied to it in fp32, and it is rounded into the model. Nothing is saved on what
    training holds: 2 bytes of weight, 2 of gradient and 12 in the optimizer are the 16 of fp32. Saved are half of the
    activations, and time where hardware has bf16.
    """

    acts_on: ClassVar[str] = "weights, activations, gradients"
    state_bytes = 12

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        return adamw_with_master_weights()(parameters, lr=learning_rate)  # type: ignore[call-arg]


class Adafactor(OptimizerTechnique):
    """Second moments of a matrix as one row and one column, no first moment: some hundredths of a byte a parameter.

    V ≈ r·cᵀ / mean(r), with r and c the running means of the squared gradient over each row and column; vectors keep
    theirs whole (Shazeer and Stern, 2018, arXiv:1804.04235; torch.optim.Adafactor). The step is relative: the rate is
    multiplied by the root mean square of the tensor's own values, at least 1e-3, so AdamW's rate is too small for it.

    Attributes:
        learning_rate: instead of the workload's; torch's own default is 0.01.
    """

    learning_rate: float | None = Field(None, gt=0)

    def refuse(self, setting: Setting) -> str | None:
        others = (*setting.before, *setting.after)
        if any(isinstance(other, Parallel) and other.splits_model and other.dimension != "stage" for other in others):
            return "torch's Adafactor changes norms in place, which ranks that share a tensor have parts of alone"
        return super().refuse(setting)

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adafactor(parameters, lr=self.learning_rate or learning_rate)


class SgdMomentum(OptimizerTechnique):
    """Stochastic gradient descent with momentum: one fp32 state, 4 bytes a parameter instead of 8.

    m ← momentum·m + g, w ← w − rate·m (torch.optim.SGD). A step is as long as the gradient, not as the rate, so
    AdamW's rate is far too small for it, and on transformers it needs more steps whatever the rate.

    Attributes:
        momentum: how much of the last step goes on.
        learning_rate: instead of the workload's.
    """

    state_bytes: ClassVar[float | None] = 4
    momentum: float = Field(0.9, gt=0, lt=1)
    learning_rate: float | None = Field(None, gt=0)

    def make(self, parameters: list[nn.Parameter], learning_rate: float, context: Context) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(parameters, lr=self.learning_rate or learning_rate, momentum=self.momentum)


def missing_compiler(device: str) -> str | None:
    """Why torch.compile cannot make kernels for a device here: C++ for a CPU, a launcher in C for a GPU."""
    if Device.parse(device).on_gpu:
        wanted, language = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"], "C"
    else:
        default = "clang++" if sys.platform == "darwin" else "g++"
        wanted, language = [os.environ.get("CXX", default)], "C++"
    if any(shutil.which(name) for name in wanted):
        return None
    return f"torch.compile needs a {language} compiler, and {' or '.join(wanted)} is not there"
