"""Tensor parallelism: every rank has a share of each matrix of a layer, and computes with it on all rows of the batch.

B, T, H: batch, tokens, width; N: ranks along the dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.techniques.losses import FusedLinearCrossEntropy
from membench.builtin.techniques.parallel import sequence_parallel, tensor_plan
from membench.plugins import Context, Dimension, Parallel, Setting
from membench.plugins.parallel import degrees

if TYPE_CHECKING:
    import torch
    from torch import nn


class TensorParallel(Parallel):
    """Each rank has 1/N of every projection, of the embedding and of the output head; norms are whole on all ranks.

    Queries, keys, values and the way into a feed-forward network are split by outputs (heads, channels), the way out of
    both by inputs, so that each of them costs one all-reduce of B·T·H forward. The embedding is split by token ids, the
    head by outputs, whose logits are gathered. Weights, gradients, states and the key-value cache take 1/N; between
    attention and feed-forward network activations are whole, unless ``sequence_parallel`` splits them by tokens.

    Source: torch.distributed.tensor.parallel.parallelize_module, by transformers' own plan for the model where it has
    one, else by the names of the decoder's projections (Shoeybi et al., 2019, Megatron-LM, arXiv:1909.08053;
    Korthikanti et al., 2022, for sequence_parallel). Limits: heads and key-value heads must be divisible by N; fused
    projections and mixtures of experts are split only where transformers' plan names a style that torch has.

    Attributes:
        plan: styles by pattern over the paths of modules in place of all that, as in transformers' tp_plan:
            {"model.layers.*.mlp.up_proj" = "colwise"}.
        sequence_parallel: whether norms and residuals are split by tokens within the list of decoder layers.
    """

    acts_on: ClassVar[str] = "weights"
    dimension: ClassVar[Dimension] = "tensor"
    splits_model: ClassVar[bool] = True
    plan: Mapping[str, str] = Field(default_factory=dict)
    sequence_parallel: bool = False

    def check(self, setting: Setting) -> str | None:
        for pattern, style in self.plan.items():
            if style not in tensor_plan.STYLES:
                return f"plan: '{pattern}' = '{style}' is no style; there are {', '.join(tensor_plan.STYLES)}"
        return "sequence_parallel has no meaning with a plan" if self.plan and self.sequence_parallel else None

    def refuse(self, setting: Setting) -> str | None:
        if reason := super().refuse(setting):
            return reason
        assert setting.ranks is not None
        count = degrees((*setting.before, self, *setting.after), setting.ranks)[self.dimension]
        if any(isinstance(other, FusedLinearCrossEntropy) for other in (*setting.before, *setting.after)):
            return "'fused-linear-cross-entropy' reads the weight of the output head, which ranks share here"
        if self.sequence_parallel and setting.workload.decoded_tokens_per_step() is not None:
            return "sequence_parallel splits tokens, and generating takes one at a time"
        if self.sequence_parallel and (tokens := setting.workload.longest_sequence()) % count:
            return f"sequence_parallel: {tokens} tokens cannot be shared evenly among {count} ranks"
        shape = setting.model.shape
        return tensor_plan.not_divisible(shape.heads, shape.key_value_heads, count) if shape else None

    def nominal_share(self) -> float | None:
        return None  # norms stay whole

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        """Make a group of parameters of those that are split along the same ranks, and one of those that are whole.

        On a GPU torch steps through all tensors of a group at once, and refuses a mixture.
        """
        groups: dict[Any, dict[str, Any]] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                key = number, getattr(parameter, "device_mesh", None)
                groups.setdefault(key, {**group, "params": []})["params"].append(parameter)
        optimizer.param_groups[:] = groups.values()
        return optimizer

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        assert context.ranks is not None
        mesh = context.ranks.mesh[self.dimension]
        if self.plan:
            tensor_plan.apply(module, mesh, tensor_plan.expanded(module, self.plan))
        elif self.sequence_parallel:
            sequence_parallel.apply(module, mesh)
        else:
            tensor_plan.apply(module, mesh, tensor_plan.found(module, mesh.size()))
        return module
