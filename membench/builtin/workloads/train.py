"""Training steps with an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from membench.builtin.workloads.reading import ReadsCorpus
from membench.plugins import Context, Step, Technique, Tokens, TrainingStep, Unsuitable, stepping

if TYPE_CHECKING:
    import torch
    from torch import nn


class Train(ReadsCorpus):
    """Training steps (next-token loss): parts forward, backward and optimizer.

    Without ``data`` it goes through the built-in text from its start; with it, through shuffled rows of a corpus.
    """

    trains: ClassVar[bool] = True
    batch_size: int = Field(2, ge=1, le=65_536)
    sequence_length: int = Field(128, ge=2, le=1_048_576)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)

    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trained:
            raise Unsuitable("no parameter of the model can be trained")
        optimizer: torch.optim.Optimizer = kinds[self.optimizer](trained, lr=self.learning_rate)
        for technique in techniques:
            optimizer = technique.optimizer(optimizer, module, context)
        context.inventory["optimizer"] = lambda: optimizer.state
        pieces = TrainingStep(
            lambda batch: [batch],
            next_token_loss,
            lambda value: value.backward(),
            lambda: optimizer.step(),
            lambda: optimizer.zero_grad(),
        )
        for technique in techniques:
            pieces = technique.training_step(pieces, context)

        def step() -> torch.Tensor:
            # Gradients are dropped first, so that what is held after a step is what training holds: all of it.
            pieces.zero_grad()
            batch = tokens(self.tokens_per_step()).view(self.batch_size, self.sequence_length).to(context.device)
            whole = torch.zeros((), device=context.device)
            for rows in pieces.split(batch):
                share = len(rows) / len(batch)
                with context.part("forward"), stepping(techniques, context):
                    value = pieces.loss(module, rows) * share
                with context.part("backward"):
                    pieces.backward(value)
                whole += value.detach()
            with context.part("optimizer"):
                pieces.step()
            return whole

        return step


def next_token_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32 of each next token; ``batch`` (B, T) of token ids."""
    import torch

    output = module(batch)
    logits = getattr(output, "logits", output)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
