"""Data parallel training: every rank has the whole model, and its own rows of each batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from membench.plugins import Context, Dimension, Parallel, Setting, TrainingStep
from membench.worker.breakdown import COMMUNICATION
from membench.worker.communication_memory import Buckets

if TYPE_CHECKING:
    import torch
    from torch import nn


class DistributedDataParallel(Parallel):
    """Every rank has all weights and its share of the batch; gradients are averaged while the backward pass runs.

    Nothing of the model is saved: a rank has activations for fewer rows, and one more copy of the gradients, the
    buckets in which they travel. ``gradient_as_bucket_view`` makes gradients views of the buckets.

    Source: torch.nn.parallel.DistributedDataParallel (Li et al., 2020, arXiv:2006.15704). Buckets are rebuilt in the
    second step and resident from the third on.
    """

    acts_on: ClassVar[str] = "activations"
    dimension: ClassVar[Dimension] = "data"
    shares_batch: ClassVar[bool] = True
    warmup_steps: ClassVar[int] = 3
    gradient_as_bucket_view: bool = False

    _wrapped: nn.Module | None = PrivateAttr(None)

    def refuse(self, setting: Setting) -> str | None:
        if not setting.workload.trains:
            return "it averages gradients over ranks, and this workload has none"
        return super().refuse(setting)

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel as Wrapper

        assert context.ranks is not None
        self._wrapped = Wrapper(
            module,
            process_group=context.ranks.mesh[self.dimension].get_group(),
            gradient_as_bucket_view=self.gradient_as_bucket_view,
        )
        return module

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        assert self._wrapped is not None
        context.inventory[COMMUNICATION] = Buckets(self._wrapped)

        def loss(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
            # The wrapper prepares its buckets in its own forward pass.
            assert self._wrapped is not None
            return step.loss(self._wrapped, rows)

        return dataclasses.replace(step, loss=loss)
