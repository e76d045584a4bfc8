"""Tensor parallelism whose norms and residuals are split by tokens within the list of decoder layers.

B, T, H: batch, tokens, width; N: ranks. Between projections each rank has (B, T/N, H).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from membench.builtin.techniques.decoder_layers import the_layer_list
from membench.builtin.techniques.parallel import tensor_plan
from membench.plugins import Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def apply(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split a decoder's projections, and its norms by tokens.

    Attention and feed-forward network gather their input (all-gather), and scatter their output (reduce-scatter) in
    place of the all-reduce. The whole sequence enters the first layer and leaves the last one.

    Raises:
        Unsuitable: if a layer has parameters that are neither theirs nor norms', or is not split by names.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, SequenceParallel

    layers = the_layer_list(module, None)
    paths = {id(child): path for path, child in module.named_modules()}
    pairs = tensor_plan.parts(module, mesh.size())
    plan = tensor_plan.by_names(module, mesh.size())
    styles: dict[str, Any] = {}
    for (path, layer), (attention, network) in zip(layers.named(), pairs, strict=True):
        for holder in (attention.holder, network.holder):
            if holder is layer:
                raise Unsuitable(f"'{path}' has no module around its projections, at which tokens could be gathered")
            holder.register_forward_pre_hook(_Gathered(mesh), with_kwargs=True)
        known = {id(part) for holder in (attention.holder, network.holder) for part in holder.modules()}
        for name, child in layer.named_modules():
            if not child._parameters or id(child) in known:
                continue
            if "norm" not in type(child).__name__.lower():
                raise Unsuitable(f"'{path}.{name}' is a {type(child).__name__}, which is not split by tokens")
            styles[paths[id(child)]] = SequenceParallel(use_local_output=True)
        for out in (attention.output, network.down):
            styles[paths[id(out)]] = RowwiseParallel(output_layouts=Shard(1))
    tensor_plan.apply(module, mesh, {**plan, **tensor_plan.ends(module)}, styles)
    layers.layers[0].register_forward_pre_hook(_Split(mesh), with_kwargs=True)
    layers.layers[-1].register_forward_hook(_Whole(mesh))


class _Hook:
    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def _of(self, x: torch.Tensor, now: Any, then: Any) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(x, self._mesh, [now], run_check=False).redistribute(placements=[then])


class _Split(_Hook):
    """Before the first layer: of (B, T, H) a rank keeps its tokens."""

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        x, tokens, count = _first(given, named), _first(given, named).shape[1], self._mesh.size()
        if tokens % count:
            raise ValueError(f"sequence_parallel: {tokens} tokens cannot be shared evenly among {count} ranks")
        return _with_first(given, named, self._of(x, Replicate(), Shard(1)).to_local())


class _Gathered(_Hook):
    """Before attention and feed-forward network: all tokens, as a tensor that knows that they are whole on all ranks.

    So their projections' gradients of it are added up once, and not for each projection.
    """

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        return _with_first(given, named, self._of(_first(given, named), Shard(1), Replicate()))


class _Whole(_Hook):
    """After the last layer: all tokens."""

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        if isinstance(output, tuple):
            return (self._of(output[0], Shard(1), Replicate()).to_local(), *output[1:])
        return self._of(output, Shard(1), Replicate()).to_local()


def _first(given: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = given[0] if given else named["hidden_states"]
    return found


def _with_first(given: tuple[Any, ...], named: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *given[1:]), named) if given else (given, {**named, "hidden_states": x})
