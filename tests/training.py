"""A training of a few steps in the tests' own process, with a stack of techniques or without."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench import plugins
from membench.builtin.workloads.train import Train

if TYPE_CHECKING:
    import torch
    from torch import nn

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came out: the module, the loss of each step, and what the optimizer keeps."""

    module: nn.Module
    losses: list[float]
    optimizer_state: Any

    def largest_difference(self, other: Trained) -> float:
        """Of any weight from its counterpart."""
        pairs = zip(self.module.parameters(), other.module.parameters(), strict=True)
        return max((own - its).abs().max().item() for own, its in pairs)


def context(model: plugins.Model) -> plugins.Context:
    return plugins.Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, Path(tempfile.gettempdir()))


def train(
    model: plugins.Model,
    techniques: Sequence[plugins.Technique] = (),
    module: nn.Module | None = None,
    frozen: Iterable[str] = (),
    **options: Any,
) -> Trained:
    """Train for three steps on the same random tokens each time.

    Args:
        module: instead of the model's own.
        frozen: names of parameters that are not to be trained.
        options: of the workload.
    """
    import torch

    torch.set_num_threads(1)
    surroundings = context(model)
    built = model.build(surroundings) if module is None else module
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(name not in set(frozen))
    for technique in techniques:
        built = technique.apply(built, surroundings)
    built.train()
    random = torch.Generator().manual_seed(1)
    vocabulary = model.vocabulary(built)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (count,), generator=random)

    torch.manual_seed(2)  # dropout draws from it
    defaults = {"batch_size": 4, "sequence_length": 32, "optimizer": "sgd", "learning_rate": 0.5}
    workload = Train.model_validate(defaults | options)
    step = workload.start(built, tokens, techniques, surroundings)
    losses = [loss.item() for _ in range(STEPS) if (loss := step()) is not None]
    return Trained(built, losses, surroundings.inventory["optimizer"]())
