"""Which module is split how: transformers' own plan for a model, or the names of a decoder's projections.

A plan maps paths of modules to styles, under transformers' names of them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques import decoder_config, projections
from membench.builtin.techniques.decoder_layers import layer_lists
from membench.builtin.techniques.pruning import is_transposed
from membench.plugins import Unsuitable, output_head

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

STYLES = (
    "colwise", "rowwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "embedding_rowwise", "replicated_with_grad_allreduce", "replicate",
)  # fmt: skip
"""transformers' styles that torch's ``parallelize_module`` has, too."""
_BY_OUTPUTS = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
_OF_NORMS = frozenset({"replicated_with_grad_allreduce", "replicate"})
_EMBEDDING, _HEAD = "embedding_rowwise", "colwise_gather_output"


def not_divisible(heads: int, key_value_heads: int, count: int) -> str | None:
    """Return why a decoder's heads cannot be shared among some ranks; ``None`` if they can."""
    for number, kind in ((heads, "heads"), (key_value_heads, "key-value heads")):
        if number % count:
            return f"{number} {kind} cannot be shared among {count} ranks"
    return None


def found(module: nn.Module, count: int) -> dict[str, str]:
    """Return the plan for a model on some ranks, with its embedding and its output head.

    Raises:
        Unsuitable: if neither transformers nor the names of its projections tell how it can be split, with the reason.
    """
    own: Mapping[str, str] = getattr(module, "_tp_plan", None) or {}
    unknown = next(((pattern, style) for pattern, style in own.items() if style not in STYLES), None)
    plan = expanded(module, own) if unknown is None else {}
    layers = {path: style for path, style in plan.items() if style != _EMBEDDING and style != _HEAD}
    if layers:
        config = decoder_config.text_config(module)
        heads = decoder_config.number(config, decoder_config.HEADS) or count
        key_value_heads = decoder_config.number(config, decoder_config.KEY_VALUE_HEADS) or heads
        if reason := not_divisible(heads, key_value_heads, count):
            raise Unsuitable(reason)
    else:
        try:
            plan = by_names(module, count)
        except Unsuitable as error:
            if unknown is None:
                raise
            pattern, style = unknown
            said = f"transformers' plan splits '{pattern}' by the style '{style}', which torch does not have"
            raise Unsuitable(f"{said}; and {error}") from None
    return {**plan, **ends(module)}


def by_names(module: nn.Module, count: int) -> dict[str, str]:
    """Return a plan for the layers of a decoder from the names of their projections.

    The attentions' modules are told of their fewer heads.

    Raises:
        Unsuitable: if a layer cannot be split so, with the reason.
    """
    paths = {id(child): path for path, child in module.named_modules()}
    plan: dict[str, str] = {}
    for attention, network in parts(module, count):
        outward = (attention.output, network.down)
        plan |= {paths[id(each)]: "colwise" for each in (*attention.into, *network.up)}
        plan |= {paths[id(each)]: "rowwise" for each in outward}
        attention.describe(attention.key_value_heads // count)
    return plan


def parts(module: nn.Module, count: int) -> list[tuple[projections.Attention, projections.FeedForward]]:
    """Return the attention and the feed-forward network of each decoder layer, checked that ranks can share them.

    Raises:
        Unsuitable: if they cannot, with the reason.
    """
    listed = []
    for each in layer_lists(module, None):
        config = decoder_config.config_of(module, each.path)
        for path, layer in each.named():
            _refuse_transposed(path, layer)
            attention = projections.attention(path, layer, config, {"qkv": (), "output": None, "heads": None})
            network = projections.feed_forward(path, layer, (), None)
            if len(attention.into) != 3:
                raise Unsuitable(
                    f"'{path}' has queries, keys and values in one projection, which is not split by heads"
                )
            if any(up.weight.shape[0] != network.width for up in network.up):  # type: ignore[index]
                raise Unsuitable(f"'{path}' has gates and values in one projection, which is not split by channels")
            if reason := not_divisible(attention.heads, attention.key_value_heads, count):
                raise Unsuitable(reason)
            listed.append((attention, network))
    return listed


def ends(module: nn.Module) -> dict[str, str]:
    """Return the styles of the embedding and of the output head, where the model names them."""
    paths = {id(child): path for path, child in module.named_modules()}
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    named = ((embedding, _EMBEDDING), (output_head(module), _HEAD))
    return {paths[id(layer)]: style for layer, style in named if id(layer) in paths}


def expanded(module: nn.Module, patterns: Mapping[str, str]) -> dict[str, str]:
    """Return a plan with the paths that patterns match; a later pattern takes precedence."""
    names = [name for name, _ in module.named_modules() if name]
    return {
        name: style for pattern, style in patterns.items() for name in names if fnmatch.fnmatchcase(name, pattern)
    }  # fmt: skip


def apply(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], own: Mapping[str, Any] | None = None) -> None:
    """Split the modules of a plan over a mesh of one dimension. Tied weights stay tied.

    Args:
        own: torch's styles by path, in place of the plan's.

    Raises:
        Unsuitable: if a module is not of a kind that can be split, or tied weights would be split in two ways.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    styles = {path: style for path, name in plan.items() if (style := _style(name)) is not None}
    for path, name in plan.items():
        _refuse_kind(path, module.get_submodule(path), name)
    learns = {name: parameter.requires_grad for name, parameter in module.named_parameters(remove_duplicate=False)}
    tied = _tied(module, plan)
    for path, style in {**styles, **(own or {})}.items():
        parallelize_module(module.get_submodule(path), mesh, style)
        for first, second in tied:
            if path == first:
                # The same shards serve both; the second one's own style then finds them split already.
                _tie(module, first, second)
    for first, second in tied:
        _tie(module, first, second)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(learns[name])


def _tied(module: nn.Module, plan: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return pairs of paths in a plan whose modules have one weight."""
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    pairs = []
    for names in places.values():
        holders = [name.rpartition(".")[0] for name in names]
        split = [holder for holder in holders if holder in plan and plan[holder] not in _OF_NORMS]
        if len(holders) == 1 or not split:
            continue
        ways = {plan.get(holder) in _BY_OUTPUTS or plan.get(holder) == _EMBEDDING for holder in holders}
        is_weight = all(name.rpartition(".")[2] == "weight" for name in names)
        if len(names) != 2 or len(split) != 2 or ways != {True} or not is_weight:
            raise Unsuitable(f"'{names[0]}' and '{names[1]}' are one weight, which would be split in two ways")
        first, second = sorted(split, key=list(plan).index)
        pairs.append((first, second))
    return pairs


def _tie(module: nn.Module, first: str, second: str) -> None:
    module.get_submodule(second)._parameters["weight"] = module.get_submodule(first)._parameters["weight"]


def _style(name: str) -> Any:
    """Return torch's style for one of transformers' names; ``None`` for what stays as it is."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    made: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "replicate": lambda: None,
        # Norms of each head by itself, (B, T, heads, size): their weights' gradients are sums over all ranks' heads.
        "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
    }
    if name in _BY_OUTPUTS and name not in made:
        return ColwiseParallel(output_layouts=Replicate())
    return made.get(name, lambda: RowwiseParallel(input_layouts=Replicate()))()


def _refuse_kind(path: str, layer: nn.Module, style: str) -> None:
    from torch import nn

    if style in _OF_NORMS:
        return
    _refuse_transposed(path, layer)
    kind = nn.Embedding if style == _EMBEDDING else nn.Linear
    weight = layer._parameters.get("weight")
    is_plain = weight is not None and not hasattr(weight.data, "__tensor_flatten__")
    if not isinstance(layer, kind) or type(layer).forward is not kind.forward or not is_plain:
        raise Unsuitable(f"'{path}' is a {type(layer).__name__}: torch splits plain {kind.__name__} layers only")


def _refuse_transposed(path: str, layer: nn.Module) -> None:
    for name, child in layer.named_modules():
        if is_transposed(child):
            whole = ".".join(filter(None, (path, name)))
            raise Unsuitable(f"'{whole}' is a Conv1D, as GPT-2 has, which torch's parallelize_module cannot split")
