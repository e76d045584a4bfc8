"""No model: for workloads that only read data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class NoModel(Model):
    """A vocabulary without weights, for workloads that only read: of bytes up to 256, else of words by their rank."""

    gives_logits: ClassVar[bool] = False
    vocabulary_size: int = Field(256, ge=2, le=16_777_216)

    def build(self, context: Context) -> nn.Module:
        return self.skeleton()

    def skeleton(self) -> nn.Module:
        from torch import nn

        return nn.Module()

    def miniature(self) -> Model:
        return self

    def vocabulary(self, module: nn.Module) -> int:
        return self.vocabulary_size
