"""Training inside a technique's ``apply``: recovery after pruning, quantization-aware training, distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from membench.builtin.workloads.train import token_loss
from membench.data import corpus

if TYPE_CHECKING:
    import torch
    from torch import nn

    from membench.plugins import Context

_BATCH, _LENGTH = 8, 128


def windows(module: nn.Module, context: Context, seed: int, text_tokens: int | None = None) -> Iterator[torch.Tensor]:
    """Batches of token ids (B, T) from random places of the training text, without end.

    Args:
        text_tokens: use only so many tokens from the start of the text; ``None``: all of it.
    """
    import torch

    vocabulary = context.model.vocabulary(module)
    encoded = context.model.encode(corpus.split()[0])
    source = (corpus.ids(vocabulary) if encoded is None else encoded)[:text_tokens]
    length = min(_LENGTH, (context.model.max_tokens() or _LENGTH), len(source) - 1)
    random = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(source) - length, (_BATCH,), generator=random).tolist()
        rows = [[token % vocabulary for token in source[start : start + length]] for start in starts]
        yield torch.tensor(rows, dtype=torch.long, device=context.device)


def tune(
    module: nn.Module,
    context: Context,
    steps: int,
    learning_rate: float,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = token_loss,
    text_tokens: int | None = None,
) -> None:
    """Train all parameters that want gradients with AdamW, the rate falling linearly to zero.

    In a rehearsal it is one step. It ends where the loss is no number any more, and says so to the context. Gradients
    and the optimizer's states are gone afterwards.
    """
    import torch

    was_training = module.training
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = min(steps, 1) if context.rehearsal else steps
    batches = windows(module, context, context.seed, text_tokens)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        value = loss(module, next(batches))
        if not math.isfinite(value.item()):
            context.diverged.append(f"the loss of training while converting became {value.item()} in step {step + 1}")
            break
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    module.train(was_training)
