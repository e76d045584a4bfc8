"""Training steps with an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from membench.builtin.workloads import training
from membench.builtin.workloads.reading import ReadsCorpus
from membench.plugins import Context, Step, Technique, Tokens, logits_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_MASKED_EVERY = 7  # 15%, as Devlin et al., 2018 (arXiv:1810.04805) mask
_NOT_JUDGED = -100


class Train(ReadsCorpus):
    """Training steps (next-token loss): parts forward, backward and optimizer.

    A model of transformers that fills in masked tokens (``…ForMaskedLM``) learns these: every seventh is masked.

    Without ``data`` it goes through the built-in text from its start; with it, through shuffled rows of a corpus.
    """

    imports: ClassVar[tuple[str, ...]] = ("torch", "torch._dynamo")  # which torch's optimizers import
    trains: ClassVar[bool] = True
    batch_size: int = Field(2, ge=1, le=65_536)
    sequence_length: int = Field(128, ge=2, le=1_048_576)
    optimizer: training.Optimizer = "adamw"
    learning_rate: float = Field(1e-4, gt=0)

    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        def next_batch() -> torch.Tensor:
            return tokens(self.tokens_per_step()).view(self.batch_size, self.sequence_length).to(context.device)

        return training.steps(module, next_batch, token_loss, self.optimizer, self.learning_rate, techniques, context)


def token_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32 of the tokens that a module predicts; ``batch`` (B, T) of token ids."""
    return (masked_token_loss if predicts_masked_tokens(type(module)) else next_token_loss)(module, batch)


def predicts_masked_tokens(kind: type[nn.Module]) -> bool:
    """Whether transformers' name of a class says that it fills in masked tokens."""
    return kind.__name__.endswith("ForMaskedLM")


def masked_token_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32 of masked tokens, one in ``_MASKED_EVERY``; ``batch`` (B, T) of token ids.

    They are replaced by the last token id: random weights know no other mask, and time and memory do not depend on it.
    """
    import torch

    is_masked = torch.zeros_like(batch, dtype=torch.bool)
    is_masked[:, ::_MASKED_EVERY] = True
    mask = module.config.get_text_config().vocab_size - 1  # type: ignore[union-attr, operator]
    given = batch.masked_fill(is_masked, mask)
    targets = batch.masked_fill(~is_masked, _NOT_JUDGED)
    logits = logits_of(module(given), given).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_NOT_JUDGED)


def next_token_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in fp32 of each next token; ``batch`` (B, T) of token ids."""
    import torch

    logits = logits_of(module(batch), batch)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
