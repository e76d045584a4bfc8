"""Fully sharded data parallel training: every rank keeps its share of each weight, and gathers layers as it runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import PrivateAttr

from membench.builtin.techniques.activations import OffloadActivations
from membench.builtin.techniques.decoder_layers import layer_lists
from membench.builtin.techniques.losses import FusedLinearCrossEntropy
from membench.builtin.techniques.parallel.micro_batches import GradientSync, before_each
from membench.builtin.techniques.parallel.plain_weights import refuse_other_weights
from membench.host.device import Device
from membench.plugins import Context, Dimension, Parallel, Setting, TrainingStep, Unsuitable, output_head
from membench.units import format_bytes

if TYPE_CHECKING:
    from torch import nn

_LEFT_WHOLE = 0.05
"""Share of the weights that may be left whole without a remark; buffers such as rotary angles always are."""


class FullyShardedDataParallel(Parallel):
    """Each rank keeps 1/N of every weight, gradient and optimizer state, and gathers a layer while that layer runs.

    Weights of a decoder layer are gathered before it goes forward and backward, and its gradients are reduced and
    scattered after it went backward. What is outside of the layers (embedding, final norm, output head) is gathered for
    the whole step. With ``wrap = "root"`` all weights are one group, there whole from the forward pass to the end of
    the backward pass: then the peak is higher than without sharding.

    Over gloo a collective holds one more copy of the group that it gathers, which NCCL does not. After a forward pass
    without a backward pass the outermost group is sharded again, as in inference.

    Source: torch.distributed.fsdp.fully_shard (FSDP2; Zhao et al., 2023, arXiv:2304.11277).

    Attributes:
        wrap: ``layers``: a group for each decoder layer and one for the rest; ``root``: one group for all.
        reshard_after_forward: whether a layer is dropped between its forward and backward pass.
        apart: whether embedding and output head are groups of their own.
        param_dtype: of gathered weights and of the arithmetic; shards, gradients of shards and states keep their type.
        reduce_dtype: in which gradients are reduced; ``None``: as ``param_dtype``.
        offload: whether shards, their gradients and states are in the CPU's memory.
        sync: when gradients are reduced, if the batch is accumulated from micro-batches.
    """

    acts_on: ClassVar[str] = "weights, gradients, optimizer, activations"
    dimension: ClassVar[Dimension] = "data"
    shares_batch: ClassVar[bool] = True
    splits_model: ClassVar[bool] = True
    warmup_steps: ClassVar[int] = 2
    imports: ClassVar[tuple[str, ...]] = ("torch", "torch.distributed.fsdp")
    wrap: Literal["layers", "root"] = "layers"
    reshard_after_forward: bool = True
    apart: bool = False
    param_dtype: Literal["bf16", "fp16"] | None = None
    reduce_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    offload: bool = False
    sync: GradientSync = "micro-batch"

    _root: weakref.ref[Any] | None = PrivateAttr(None)

    def computing_bits(self) -> float | None:
        return 16 if {self.param_dtype, self.reduce_dtype} & {"bf16", "fp16"} else None

    def refuse(self, setting: Setting) -> str | None:
        others = (*setting.before, *setting.after)
        if any(isinstance(other, FusedLinearCrossEntropy) for other in others):
            return "'fused-linear-cross-entropy' reads the head's weight beside the module, and it is sharded there"
        if any(isinstance(other, OffloadActivations) for other in others):
            return "'offload-activations' would move the gathered weights, which fsdp drops and gathers again"
        return super().refuse(setting)

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        refuse_other_weights(module, "sharded")
        settings = self._settings(context)
        if self.wrap == "layers":
            try:
                lists = layer_lists(module, None)
            except Unsuitable as error:
                what = str(error).partition(":")[0]
                raise Unsuitable(f"{what}: shard it as one group by wrap = 'root'") from None
            for layer in (layer for each in lists for layer in each.layers):
                fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **settings)
        for part in self._ends(module):
            fully_shard(part, reshard_after_forward=self.reshard_after_forward, **settings)
        # Weakly: the technique outlives the rehearsal, of whose module nothing must stay.
        self._root = weakref.ref(fully_shard(module, **settings))
        return module

    def _ends(self, module: nn.Module) -> list[nn.Module]:
        """Return the embedding and the output head, if they are to be groups of their own."""
        if not self.apart:
            return []
        embedding: Any = getattr(module, "get_input_embeddings", lambda: None)()
        head = output_head(module)
        if embedding is None or head is None:
            raise Unsuitable("apart = true: the model does not say what its embedding and its output head are")
        if embedding.weight is head.weight:
            raise Unsuitable("apart = true: the embedding and the output head share one weight")
        return [embedding, head]

    def _settings(self, context: Context) -> dict[str, Any]:
        import torch
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        assert context.ranks is not None
        types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
        precision = MixedPrecisionPolicy(param_dtype=types[self.param_dtype], reduce_dtype=types[self.reduce_dtype])
        settings: dict[str, Any] = {"mesh": context.ranks.mesh[self.dimension], "mp_policy": precision}
        if self.offload:
            # Pinning needs an accelerator.
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=Device.parse(context.device).on_gpu)
        return settings

    @contextlib.contextmanager
    def step_context(self, context: Context) -> Iterator[None]:
        import torch

        yield
        root = None if self._root is None else self._root()
        if root is not None and not torch.is_grad_enabled():
            root.reshard()

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        root = None if self._root is None else self._root()
        if self.sync == "micro-batch" or root is None:
            return step
        return before_each(step, root.set_requires_gradient_sync)

    def remark(self, module: nn.Module, context: Context) -> str | None:
        from torch.distributed.tensor import DTensor

        if self.offload and not Device.parse(context.device).on_gpu:
            return "offloads nothing: what it keeps is in the CPU's memory already"
        tensors = [*module.parameters(), *module.buffers()]
        whole_bytes = sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, DTensor))
        if whole_bytes > _LEFT_WHOLE * sum(tensor.nbytes for tensor in tensors):
            return f"leaves {format_bytes(whole_bytes)} of the model whole on each rank: buffers are not sharded"
        return None
