from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from membench.plugins import Context, Step, Technique, Tokens, Workload, stepping

if TYPE_CHECKING:
    from torch import nn


class Reread(Workload):
    """Reads the same text twice."""

    contract: ClassVar[int] = 1
    length: int = Field(64, ge=1)

    def longest_sequence(self) -> int:
        return self.length

    def tokens_per_step(self) -> int:
        return 2 * self.length

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        ids = tokens(self.length)[None].to(context.device)

        def step() -> None:
            for part in ("first", "second"):
                with context.part(part), torch.no_grad(), stepping(techniques, context):
                    module(ids)

        return step
