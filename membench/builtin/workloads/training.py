"""A step of training in its parts, each replaceable by a technique, whatever it is that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from membench.plugins import (
    Context,
    Step,
    Technique,
    TrainingStep,
    Unsuitable,
    given_back,
    own_rows,
    parallel_last,
    stepping,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Optimizer: TypeAlias = Literal["adamw", "sgd"]
_FORWARD = "forward"


def steps(
    module: nn.Module,
    next_batch: Callable[[], torch.Tensor],
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    optimizer_name: Optimizer,
    learning_rate: float,
    techniques: Sequence[Technique],
    context: Context,
) -> Step:
    """The step: parts forward, backward and optimizer.

    Args:
        next_batch: on the device, the same on all ranks; its rows may be split.
        loss: of (module, rows): a scalar, the mean over them.

    Raises:
        Unsuitable: if nothing of the module can be trained.
    """
    import torch

    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise Unsuitable("no parameter of the model can be trained")
    optimizer: torch.optim.Optimizer = kinds[optimizer_name](trained, lr=learning_rate)
    members = parallel_last(techniques)
    for technique in members:
        optimizer = given_back(technique.optimizer(optimizer, module, context), technique, "optimizer", "optimizer")
    context.inventory["optimizer"] = lambda: optimizer.state
    pieces = TrainingStep(
        unsplit,
        loss,
        go_backward,
        lambda: optimizer.step(),
        lambda: optimizer.zero_grad(),
    )
    for technique in members:
        pieces = given_back(technique.training_step(pieces, context), technique, "training_step", "step")

    def step() -> torch.Tensor | None:
        # Gradients are dropped first, so that what is held after a step is what training holds: all of it.
        pieces.zero_grad()
        batch = own_rows(next_batch(), techniques, context)
        whole = torch.zeros((), device=context.device)
        for rows in pieces.split(batch):
            share = len(rows) / len(batch)
            with context.part(pieces.part), stepping(techniques, context):
                value = pieces.loss(module, rows) * share
            if pieces.part == _FORWARD:
                with context.part("backward"):
                    pieces.backward(value)
            whole += value.detach()
        with context.part("optimizer"):
            pieces.step()
        return whole if pieces.has_loss else None

    return step


def unsplit(batch: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the whole batch (B, T) as its only run of rows."""
    return [batch]


def go_backward(value: torch.Tensor) -> None:
    """Compute the gradients of a loss."""
    value.backward()
