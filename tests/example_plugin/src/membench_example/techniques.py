from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from membench.plugins import Context, Technique, Unsuitable, output_head

if TYPE_CHECKING:
    from torch import nn


class TiedHead(Technique):
    """The output head takes the embedding for its weight."""

    contract: ClassVar[int] = 1
    acts_on: ClassVar[str] = "weights"

    def nominal_share(self) -> float | None:
        return None

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch

        head: Any = output_head(module)
        table: Any = next((layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)), None)
        if head is None or table is None or head.weight.shape != table.weight.shape:
            raise Unsuitable("the model has no embedding that its output head could use")
        head.weight = table.weight
        return module
