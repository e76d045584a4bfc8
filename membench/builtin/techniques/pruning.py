"""What every pruning technique shares: training afterwards to recover what was lost, and what it cannot prune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from membench.plugins import Context, Setting, Technique, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


class Pruning(Technique):
    """Prunes, and then trains what is left for ``recover_steps`` steps at ``recover_learning_rate``."""

    recover_steps: int = Field(0, ge=0)
    recover_learning_rate: float = Field(1e-3, gt=0)

    def refuse(self, setting: Setting) -> str | None:
        if any(technique.trains_adapters for technique in setting.before):
            return "adapters lie beside the weights already: prune first"
        if self.changes_weights and any((technique.nominal_bits() or 32) < 16 for technique in setting.before):
            return "quantized weights cannot be pruned: let the quantizer come after"
        return None

    @property
    def changes_weights(self) -> bool:
        """Whether it changes weights, and does not only take out whole layers."""
        return True

    def recover(self, module: nn.Module, context: Context) -> None:
        """Train every parameter that wants gradients on the training text (one step in a rehearsal)."""
        from membench.builtin.techniques.inner_training import tune

        if self.recover_steps:
            tune(module, context, self.recover_steps, self.recover_learning_rate)


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer of torch's or of GPT-2's kind (``Conv1D``, which keeps its weight transposed)."""
    from torch import nn

    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, which keeps its weight as (inputs, outputs), torch as (outputs, inputs)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def plain_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer.

    Raises:
        Unsuitable: if an earlier member of the stack has put something in the place of plain numbers.
    """
    weight = layer._parameters.get("weight")
    if (
        not is_linear(layer)
        or weight is None
        or not weight.is_floating_point()
        or hasattr(weight.data, "__tensor_flatten__")
    ):
        raise Unsuitable(f"a {type(layer).__name__} whose weight is not kept as plain numbers cannot be pruned")
    return weight
