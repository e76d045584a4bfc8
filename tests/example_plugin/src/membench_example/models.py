from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn

_VOCABULARY = 256


class TwoTables(Model):
    """A table of vectors for reading bytes and one for writing them."""

    contract: ClassVar[int] = 1
    imports: ClassVar[tuple[str, ...]] = ("torch", "membench_example.layers")
    width: int = Field(4096, ge=1)

    def build(self, context: Context) -> nn.Module:
        import torch

        from membench_example.layers import Tables

        torch.manual_seed(context.seed)
        tables: nn.Module = Tables(_VOCABULARY, self.width)
        return tables.to(context.device)

    def vocabulary(self, module: nn.Module) -> int:
        return _VOCABULARY

    def needed_bytes(self) -> int:
        return 2 * 4 * _VOCABULARY * self.width
