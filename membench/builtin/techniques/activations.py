"""What a training step keeps from forward to backward, and how long it keeps gradients.

B, T, H: batch, tokens, width; a: heads; L: layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from membench.builtin.techniques.decoder_config import value_of
from membench.builtin.techniques.decoder_layers import checkpointing_layer, layer_lists, outermost_named
from membench.plugins import Context, Setting, Technique, TrainingStep, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Training(Technique):
    """A technique that has a meaning in training alone."""

    def refuse(self, setting: Setting) -> str | None:
        return None if setting.workload.trains else "it acts on the backward pass, and this workload has none"


class Checkpointing(_Training):
    """Activations of decoder layers dropped after the forward pass and computed again in the backward pass.

    Of each checkpointed layer only its input is kept: in 16-bit 2·B·T·H bytes in place of B·T·H·(34 + 5·a·T/H)
    (Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models), at the price of a second
    forward pass through it. While a layer goes backward its activations are there whole.

    ``every_k`` = 2 checkpoints the layers 0, 2, 4 and so on. Layers are transformers' own, or the like modules that lie
    in a list; ``layers`` is a pattern over the paths of others, such as 'encoder.blocks.*'. Source:
    torch.utils.checkpoint, non-reentrant, with the random state of dropout brought back (Chen et al. 2016, Training
    Deep Nets with Sublinear Memory Cost).
    """

    acts_on: ClassVar[str] = "activations"
    layers: str | None = Field(None, min_length=1)
    every_k: int = Field(1, ge=1)

    def check(self, setting: Setting) -> str | None:
        shape = setting.model.shape
        if shape and self.every_k > shape.layers:
            return f"every_k = {self.every_k} is more than the model's {shape.layers} layers"
        return None

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        from torch.utils.checkpoint import checkpoint

        # A case may be rehearsed on a model of other parts.
        known = self.layers is None or not context.rehearsal or bool(outermost_named(module, self.layers))
        lists = layer_lists(module, self.layers if known else None)
        layers: list[Any] = [layer for each in lists for layer in each.layers]
        if self.every_k > len(layers) and not context.rehearsal:
            raise Unsuitable(f"every_k = {self.every_k} is more than the model's {len(layers)} layers")
        again = functools.partial(checkpoint, use_reentrant=False)
        own: Any = checkpointing_layer()
        for layer in layers[:: self.every_k]:
            if own and isinstance(layer, own):
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, again
            else:
                _checkpoint(layer)
        # A key-value cache would keep keys and values, and be written twice; transformers warns of it and drops it.
        configurations: list[Any] = [getattr(child, "config", None) for child in module.modules()]
        for configuration in configurations:
            if value_of(configuration, "use_cache") is not None:
                configuration.use_cache = False
        return module


def _checkpoint(layer: nn.Module) -> None:
    """Let a layer's own class be one whose forward pass is checkpointed in training.

    Raises:
        Unsuitable: if the layer has a forward of its own, which that of a class does not replace.
    """
    if "forward" in vars(layer):
        raise Unsuitable(f"a {type(layer).__name__} has a forward of its own, put in place of its class's")
    kind: Any = type(layer)
    layer.__class__ = _checkpointed(kind)


@functools.cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name that drops activations of its forward pass; the same one for layers of one class."""
    import torch
    from torch.utils.checkpoint import checkpoint

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        run = functools.partial(kind.forward, self)
        if not (self.training and torch.is_grad_enabled()):
            return run(*arguments, **named)
        return checkpoint(run, *arguments, use_reentrant=False, **named)

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _empty, (kind,), vars(self)

    names = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


def _empty(kind: Any) -> nn.Module:
    """A checkpointed layer to be filled with the state of a pickled or copied one."""
    made: Any = _checkpointed(kind)
    empty: nn.Module = made.__new__(made)
    return empty


class OffloadActivations(_Training):
    """What a GPU's forward pass keeps for the backward pass waits in the CPU's memory, pinned.

    The GPU holds the activations of the operation at hand alone; the machine holds them all, once for each operation
    that keeps them. Each crosses the bus twice. Weights stay where they are.

    Source: torch.autograd.graph.save_on_cpu(pin_memory=True), which would move weights, too. Limits: from a GPU only.
    """

    acts_on: ClassVar[str] = "activations"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def refuse(self, setting: Setting) -> str | None:
        if setting.device == "cpu":
            return "activations are in the CPU's memory already: there is nowhere to offload them to"
        return super().refuse(setting)

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        import torch

        from membench.worker.storages import storages

        moving = torch.autograd.graph.save_on_cpu(pin_memory=True)

        def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            weights = storages(module.parameters()).keys()

            def pack(tensor: torch.Tensor) -> Any:
                return tensor if storages([tensor]).keys() <= weights else moving.pack_hook(tensor)

            def unpack(kept: Any) -> torch.Tensor:
                return kept if isinstance(kept, torch.Tensor) else moving.unpack_hook(kept)

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return step.loss(module, batch)

        return dataclasses.replace(step, loss=loss)


class Accumulate(_Training):
    """A batch in k micro-batches, one after the other; their gradients add up to the whole batch's.

    Activations and logits of B / k rows in place of B; gradients are there during all k. The loss of each is weighted
    by its share of the rows, so that step and result are those of the whole batch, rounding apart.

    Limits: k must divide the batch size; dropout draws other random numbers than over the whole batch.
    """

    acts_on: ClassVar[str] = "activations"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {str(k): {"k": k} for k in (2, 4, 8)}
    needs_all_gradients: ClassVar[bool] = True
    k: int = Field(4, ge=2)

    def check(self, setting: Setting) -> str | None:
        batch_size = getattr(setting.workload, "batch_size", None)
        if not setting.workload.trains or batch_size is None:
            return None
        parts = self.k * math.prod(member.k for member in setting.before if isinstance(member, Accumulate))
        return f"{parts} micro-batches do not divide the batch size {batch_size}" if batch_size % parts else None

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        def split(batch: torch.Tensor) -> Sequence[torch.Tensor]:
            parts = step.split(batch)
            if any(len(part) % self.k for part in parts):
                raise Unsuitable(f"{self.k} micro-batches do not divide {len(parts[0])} rows")
            return [rows for part in parts for rows in part.tensor_split(self.k)]

        return dataclasses.replace(step, split=split)


class StepInBackward(_Training):
    """Each parameter is updated as soon as its gradient is there, and the gradient is freed at once.

    All gradients but one are saved: 4 bytes a parameter in fp32. The optimizer's time and memory show in ``backward``;
    ``optimizer`` is left with nothing.

    Source: Lv et al. 2023, Full Parameter Fine-tuning with Limited Resources (LOMO), with any optimizer that updates
    each parameter by itself. Limits: what needs all gradients at once (accumulation, loss scaling, clipping) cannot be
    had with it; the largest gradient, mostly the embedding's, stays; of a compiled model all come at the same moment.
    """

    acts_on: ClassVar[str] = "gradients"

    def refuse(self, setting: Setting) -> str | None:
        if any(technique.needs_all_gradients for technique in (*setting.before, *setting.after)):
            return "a member of the stack needs all gradients of a step, and here they are freed"
        if any(type(technique).optimizer is not Technique.optimizer for technique in setting.after):
            return "a member after it brings an optimizer: it must come before"
        return super().refuse(setting)

    def optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module, context: Context) -> torch.optim.Optimizer:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(functools.partial(_step_alone, optimizer, group))
        return optimizer

    def training_step(self, step: TrainingStep, context: Context) -> TrainingStep:
        return dataclasses.replace(step, step=lambda: None)


def _step_alone(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> None:
    """Let the optimizer see this parameter alone, and drop its gradient."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    optimizer.step()
    optimizer.param_groups = groups
    parameter.grad = None
