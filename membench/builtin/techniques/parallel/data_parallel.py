"""Data parallel training: every rank has the whole model, and its own rows of each batch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from membench.builtin.techniques.activations import StepInBackward
from membench.builtin.techniques.parallel.local_shards import make_shards_plain
from membench.builtin.techniques.parallel.micro_batches import GradientSync, before_each
from membench.builtin.techniques.parallel.plain_weights import refuse_other_weights
from membench.host.device import Device
from membench.plugins import Context, Dimension, Parallel, Setting, TrainingStep, Unsuitable
from membench.worker.breakdown import COMMUNICATION
from membench.worker.communication_memory import Buckets

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel as Wrapper

Hook = Literal["none", "fp16", "bf16", "powersgd"]
_STEPS_UNTIL_REBUILT = 3
"""Buckets are rebuilt at the start of the second step, and resident from the third on."""


class DistributedDataParallel(Parallel):
    """Every rank has all weights and its share of the batch; gradients are averaged while the backward pass runs.

    Nothing of the model is saved: a rank has activations for fewer rows, and one more copy of the gradients, the
    buckets in which they travel. ``gradient_as_bucket_view`` makes gradients views of the buckets, which lowers the
    peak of the optimizer's step, but not that of the backward pass: buckets are kept from step to step. While the model
    is wrapped, the weights are there twice, since the first rank's are broadcast to all.

    ``hook`` compresses what travels: ``fp16`` and ``bf16`` halve the bytes; ``powersgd`` sends two factors of a low
    rank in place of each gradient, and keeps what they leave out as one more copy of the gradients (Vogels et al.,
    2019, arXiv:1905.13727). Compression of traffic does not save memory.

    Source: torch.nn.parallel.DistributedDataParallel (Li et al., 2020, arXiv:2006.15704). What runs in it is the loss,
    so that losses that take the model apart are averaged, too.

    Attributes:
        bucket_mb: the size of a bucket in MiB; torch's own default is 25.
        powersgd_rank: of the factors.
        powersgd_start: the step from which on gradients are compressed; the first two steps are not.
        sync: when gradients are averaged, if the batch is accumulated from micro-batches.
    """

    acts_on: ClassVar[str] = "activations"
    dimension: ClassVar[Dimension] = "data"
    shares_batch: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = (
        "torch", "torch.nn.parallel", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    )  # fmt: skip
    gradient_as_bucket_view: bool = False
    bucket_mb: float | None = Field(None, gt=0)
    hook: Hook = "none"
    powersgd_rank: int = Field(1, ge=1)
    powersgd_start: int = Field(2, ge=2)
    sync: GradientSync = "micro-batch"

    _wrapped: Wrapper | None = PrivateAttr(None)

    @property
    def warmup_steps(self) -> int:  # type: ignore[override]  # it depends on the options
        return max(_STEPS_UNTIL_REBUILT, self.powersgd_start + 1 if self.hook == "powersgd" else 0)

    def computing_bits(self) -> float | None:
        # PowerSGD sends two factors of each gradient; what they leave out is in no number's precision.
        return {"none": None, "fp16": 16, "bf16": 16, "powersgd": 1}[self.hook]

    def refuse(self, setting: Setting) -> str | None:
        if not setting.workload.trains:
            return "it averages gradients over ranks, and this workload has none"
        if any(isinstance(other, StepInBackward) for other in (*setting.before, *setting.after)):
            return "'step-in-backward' uses up each gradient before it is averaged over the ranks"
        if self.hook == "bf16" and not Device.parse(setting.device).on_gpu:
            return "hook = 'bf16' needs NCCL, and the ranks of a CPU communicate by gloo"
        if self.hook == "powersgd" and self.bucket_mb and not Device.parse(setting.device).on_gpu:
            return "over gloo, hook = 'powersgd' has all gradients in one bucket: leave bucket_mb out"
        return super().refuse(setting)

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel as Wrapper

        assert context.ranks is not None
        refuse_other_weights(module, "broadcast")
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise Unsuitable("no parameter of the model can be trained")
        make_shards_plain(module)
        group = context.ranks.mesh[self.dimension].get_group()
        self._wrapped = Wrapper(
            _loss_module()(module),
            process_group=group,
            bucket_cap_mb=self._bucket_mb(module, context),
            gradient_as_bucket_view=self.gradient_as_bucket_view,
        )
        self._register_hook(self._wrapped, group)
        return module

    def _bucket_mb(self, module: nn.Module, context: Context) -> float | None:
        if self.hook != "powersgd" or Device.parse(context.device).on_gpu:
            return self.bucket_mb
        # The hook's later all-reduces begin in threads of gloo. With several buckets, ranks begin them in different
        # orders, and gloo ends the process.
        return 1 + sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad) / 2**20

    def _register_hook(self, wrapped: Wrapper, group: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        if self.hook == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                group, matrix_approximation_rank=self.powersgd_rank, start_powerSGD_iter=self.powersgd_start
            )
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif self.hook != "none":
            wrapped.register_comm_hook(group, getattr(default_hooks, f"{self.hook}_compress_hook"))

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        # The step keeps the wrapper from here on: nothing of a rehearsal's must stay.
        wrapped, self._wrapped = self._wrapped, None
        assert wrapped is not None
        buckets, of_stages = Buckets(wrapped), context.inventory.get(COMMUNICATION, tuple)
        context.inventory[COMMUNICATION] = lambda: (*of_stages(), buckets())
        if step.wrap is not None:
            # A pipeline's schedule runs the wrapper itself, for each micro-batch, and averages after the last.
            wrapped.module.loss = lambda module, given: module(given)
            step.wrap(wrapped)
            return step
        wrapped.module.loss = step.loss

        def loss(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
            # The wrapper prepares its buckets in its own forward pass.
            value: torch.Tensor = wrapped(rows)
            return value

        def synchronize(is_last: bool) -> None:
            wrapped.require_backward_grad_sync = is_last  # as no_sync() does

        step = dataclasses.replace(step, loss=loss)
        return step if self.sync == "micro-batch" else before_each(step, synchronize)


@functools.cache
def _loss_module() -> Any:
    """Return the class of a module that computes the loss of another one on rows of token ids."""
    from torch import nn

    class LossModule(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.loss: Any = None

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = self.loss(self.module, rows)
            return value

    return LossModule


class ZeroRedundancy(DistributedDataParallel):
    """ZeRO stage 1: as ``ddp``, and each rank keeps the optimizer states of its share of the parameters alone.

    A rank updates its parameters and broadcasts them. Whole parameters are shared out, each to the rank that has least
    so far, so that ranks differ where few parameters are large. The optimizer is the workload's or the stack's, made
    again by its class with the same settings over the rank's parameters (Rajbhandari et al., 2020, arXiv:1910.02054).

    Source: torch.distributed.optim.ZeroRedundancyOptimizer.
    """

    acts_on: ClassVar[str] = "optimizer"
    shares_states: ClassVar[bool] = True
    imports: ClassVar[tuple[str, ...]] = (*DistributedDataParallel.imports, "torch.distributed.optim")

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        assert context.ranks is not None
        groups = optimizer.param_groups
        if len(groups) > 1:
            raise Unsuitable("the optimizer has several groups of parameters: zero1 makes one with the same settings")
        kinds = {parameter.type() for parameter in groups[0]["params"]}
        if len(kinds) > 1:
            raise Unsuitable(f"ZeroRedundancyOptimizer needs parameters of one type, and there are {sorted(kinds)}")
        made: Any = ZeroRedundancyOptimizer(
            groups[0]["params"],
            type(optimizer),
            process_group=context.ranks.mesh[self.dimension].get_group(),
            **_settings(optimizer),
        )
        made.state = made.optim.state  # it has none of its own, and the states of this rank are to be found there
        return made


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the arguments with which an optimizer was made, besides its parameters.

    Raises:
        Unsuitable: if one of them is not to be found in it.
    """
    known = {**vars(optimizer), **optimizer.defaults}
    found = {}
    for name, argument in list(inspect.signature(type(optimizer)).parameters.items())[1:]:
        if name in known:
            found[name] = known[name]
        elif argument.default is argument.empty:
            raise Unsuitable(f"{type(optimizer).__name__} does not keep its argument '{name}': it cannot be made again")
    return found
