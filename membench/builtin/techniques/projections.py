"""The linear layers of a decoder layer: a feed-forward network's and an attention's, by standard or by given names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from membench.builtin.techniques import decoder_config
from membench.builtin.techniques.importance import Part, Slice
from membench.builtin.techniques.pruning import is_linear, is_transposed, plain_weight
from membench.plugins import NotInModel, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn

# As transformers' families and torch call them.
_UP = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "linear1", "lin1", "wi", "wi_0",
       "wi_1", "w1", "w3", "Wi")  # fmt: skip
_DOWN = ("down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "linear2", "lin2", "wo", "w2", "Wo")
_QUERY_KEY_VALUE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"), ("q", "k", "v"),
)  # fmt: skip
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "wqkv", "qkv", "qkv_lin", "in_proj", "W_pack")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "output", "out", "out_lin", "proj", "o")
_BERTS_ATTENTION = (("self.query", "self.key", "self.value"), "output.dense")
_BERTS_FEED_FORWARD = ("intermediate.dense", "output.dense")
"""BERT and its kin have a module around each projection."""
ATTENTION = (*(name for names in _QUERY_KEY_VALUE for name in names), *_FUSED, *_OUTPUT)
"""Names of projections into and out of attention."""
FEED_FORWARD = (*_UP, *_DOWN)
"""Names of projections into and out of a feed-forward network."""

_HEADS = (*decoder_config.HEADS, "heads", "_heads", "_num_heads", "num_q_heads")
_KEY_VALUE_HEADS = (*decoder_config.KEY_VALUE_HEADS, "kv_heads", "_kv_heads")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_head")
_ALL_HEADS_SIZE = ("split_size", "all_head_size", "inner_dim", "embed_dim", "kv_dim")
_MOST_NAMED = 6

Layout = Literal["by kind", "by head"]
"""How a fused projection's outputs lie: all queries, all keys, all values; or by key-value head its queries, its key
and its value."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: what leads into its inner width, and what out of it."""

    holder: nn.Module
    up: tuple[nn.Module, ...]
    down: nn.Module

    @property
    def width(self) -> int:
        return _sizes(self.down)[0]

    def part(self) -> Part:
        """Its channels. A projection of twice as many outputs has the gates before the values."""
        import torch

        width = self.width
        single = torch.arange(width).view(width, 1)
        into = []
        for layer in self.up:
            outputs = _sizes(layer)[1]
            both = torch.cat([single, single + width], dim=1) if outputs == 2 * width else single
            into.append(Slice(layer, False, both))
        return [*into, Slice(self.down, True, single)]

    def describe(self, old: int) -> None:
        """Bring up to date what the network's module says of its inner width."""
        decoder_config.replace(self.holder, (*decoder_config.INNER_WIDTH, "hidden_dim"), old, self.width)


@dataclass(frozen=True)
class Attention:
    """An attention's projections.

    Attributes:
        into: of queries, keys and values, or of all in one.
        size: of a head.
    """

    holder: nn.Module
    into: tuple[nn.Module, ...]
    output: nn.Module
    heads: int
    key_value_heads: int
    size: int

    def part(self, layout: Layout) -> Part:
        """Its key-value heads, each with the queries that use it."""
        import torch

        count, size, shared = self.key_value_heads, self.size, self.heads // self.key_value_heads
        queries = torch.arange(count * shared * size).view(count, shared * size)
        keys = torch.arange(count * size).view(count, size)
        if len(self.into) == 3:
            into = [Slice(layer, False, each) for layer, each in zip(self.into, (queries, keys, keys), strict=True)]
        elif layout == "by kind":
            first_key, first_value = self.heads * size, (self.heads + count) * size
            fused = torch.cat([queries, first_key + keys, first_value + keys], dim=1)
            into = [Slice(self.into[0], False, fused)]
        else:
            into = [Slice(self.into[0], False, torch.arange(count * (shared + 2) * size).view(count, -1))]
        return [*into, Slice(self.output, True, queries)]

    def values(self, layout: Layout) -> torch.Tensor:
        """The outputs of a fused projection that are the first key-value head's values."""
        fused = self.part(layout)[0].groups[0]
        return fused[-self.size :]

    def describe(self, key_value_heads: int) -> None:
        """Bring up to date what the attention's module says of its heads, now that it has fewer."""
        heads = key_value_heads * (self.heads // self.key_value_heads)
        decoder_config.replace(self.holder, _HEADS, self.heads, heads)
        decoder_config.replace(self.holder, _KEY_VALUE_HEADS, self.key_value_heads, key_value_heads)
        decoder_config.replace(self.holder, _ALL_HEADS_SIZE, self.heads * self.size, heads * self.size)


def feed_forward(path: str, layer: nn.Module, up: Sequence[str], down: str | None) -> FeedForward:
    """The feed-forward network of a decoder layer.

    Args:
        up: paths within the layer of what leads into the inner width; none: standard names.
        down: the path of what leads out of it.

    Raises:
        NotInModel: if a name does not fit.
        Unsuitable: if there is none that can be cut, with the reason.
    """
    kind = f"'{path}' (a {type(layer).__name__})"
    if up and down:
        found = [FeedForward(_parent(layer, down), tuple(_named(path, layer, each) for each in up),
                             _named(path, layer, down))]  # fmt: skip
    else:
        if experts := _experts(layer):
            raise Unsuitable(f"{kind} is a mixture of experts, '{experts}': their channels are not taken out")
        found = list(_feed_forwards(layer))
    if len(found) != 1:
        what = "no feed-forward network of known names" if not found else f"{len(found)} feed-forward networks"
        raise Unsuitable(f"{kind} has {what}: name one with up = [...] and down = …; {_there(layer)}")
    network = found[0]
    for each in (*network.up, network.down):
        plain_weight(each)
    widths = [_sizes(each)[1] for each in network.up]
    if any(width not in (network.width, 2 * network.width) for width in widths):
        raise Unsuitable(f"in {kind} {widths} outputs lead into a feed-forward network of {network.width} channels")
    return network


def attention(path: str, layer: nn.Module, config: Any, named: Mapping[str, Any]) -> Attention:
    """The attention of a decoder layer.

    Args:
        config: transformers' configuration of the decoder, if there is one.
        named: ``qkv``, ``output`` and ``heads``, as given by the user.

    Raises:
        NotInModel: if a name does not fit.
        Unsuitable: if there is none that can be cut, with the reason.
    """
    kind = f"'{path}' (a {type(layer).__name__})"
    if named["qkv"]:
        into = tuple(_named(path, layer, each) for each in named["qkv"])
        found = [(_parent(layer, named["qkv"][0]), into, _named(path, layer, named["output"]))]
    else:
        _refuse_multihead_attention(path, layer)
        found = list(_attentions(layer))
    if len(found) != 1:
        what = "no attention of known names" if not found else f"{len(found)} attentions"
        raise Unsuitable(f"{kind} has {what}: name one with qkv = [...] and output = …; {_there(layer)}")
    holder, into, output = found[0]
    for each in (*into, output):
        plain_weight(each)
    rows, columns = [_sizes(each)[1] for each in into], _sizes(output)[0]
    heads = named["heads"] or decoder_config.number(holder, _HEADS) or decoder_config.number(config, _HEADS)
    size = decoder_config.number(holder, _HEAD_SIZE) if not named["heads"] else None
    if size is None and not heads:
        raise Unsuitable(f"how many heads {kind} has is not known: say it with heads = …")
    size = size or columns // (heads or 1)
    heads = columns // size
    if len(into) == 3:
        key_value_heads = rows[1] // size
        fits = rows[0] == columns and rows[1] == rows[2]
    else:
        own = decoder_config.number(holder, _KEY_VALUE_HEADS) or decoder_config.number(config, _KEY_VALUE_HEADS)
        key_value_heads = (rows[0] // size - heads) // 2 if rows[0] % size == 0 else own or heads
        fits = rows[0] == (heads + 2 * key_value_heads) * size
    if not fits or not key_value_heads or heads % key_value_heads or columns % size or rows[-1] % size:
        raise Unsuitable(
            f"in {kind} {rows} outputs lead into attention and {columns} inputs out of it: not {heads} heads of {size}"
        )
    made = Attention(holder, into, output, heads, key_value_heads, size)
    if holder is not layer:
        _refuse_other_parameters(kind, made)
    return made


def refuse_shared(module: nn.Module, parts: Iterable[Part]) -> None:
    """Refuse what several places of the model use: it cannot be cut for one of them alone.

    Raises:
        Unsuitable: if a weight that is to be cut has a second place.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for part in parts:
        for side in part:
            for cut, _ in side.parameters():
                if len(names := places.get(id(cut), [])) > 1:
                    raise Unsuitable(f"'{names[0]}' and '{names[1]}' are one weight, which is not cut for both")


def _feed_forwards(layer: nn.Module) -> Iterator[FeedForward]:
    from torch import nn

    attending = [id(holder) for holder, _, _ in _attentions(layer) if holder is not layer]
    for holder in layer.modules():
        if id(holder) in attending:
            continue
        children = _projections(holder)
        up = tuple(child for name, child in children.items() if name in _UP)
        down = [child for name, child in children.items() if name in _DOWN]
        if up and len(down) == 1:
            yield FeedForward(holder, up, down[0])
        elif layers := _at(holder, _BERTS_FEED_FORWARD):
            yield FeedForward(holder, layers[:1], layers[1])
        elif isinstance(holder, nn.Sequential):
            linear = [child for child in children.values() if is_linear(child)]
            if len(linear) != 2 or _has_others(holder, linear):
                continue
            first, last = linear
            yield FeedForward(holder, (first,), last)


def _attentions(layer: nn.Module) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...], nn.Module]]:
    for holder in layer.modules():
        children = _projections(holder)
        fused = [(name,) for name in _FUSED if name in children]
        apart = [names for names in _QUERY_KEY_VALUE if all(name in children for name in names)]
        into = (*apart, *fused)
        output = [name for name in _OUTPUT if name in children and all(name not in names for names in into)]
        if len(into) == 1 and len(output) == 1:
            yield holder, tuple(children[name] for name in into[0]), children[output[0]]
        elif layers := _at(holder, (*_BERTS_ATTENTION[0], _BERTS_ATTENTION[1])):
            yield holder.get_submodule("self"), layers[:3], layers[3]


def _at(holder: nn.Module, paths: Sequence[str]) -> tuple[nn.Module, ...]:
    """The linear layers at some paths; none if one is missing."""
    found = dict(holder.named_modules())
    layers = tuple(found[path] for path in paths if path in found and is_linear(found[path]))
    return layers if len(layers) == len(paths) else ()


def _refuse_multihead_attention(path: str, layer: nn.Module) -> None:
    from torch import nn

    for name, child in layer.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            whole = ".".join(filter(None, (path, name)))
            raise Unsuitable(f"'{whole}' is a MultiheadAttention, whose heads always share the whole width")


def _refuse_other_parameters(kind: str, attention: Attention) -> None:
    """Refuse an attention with parameters that may be heads', too, beside projections and norms of a single head."""
    known = [*attention.into, attention.output]
    for name, parameter in attention.holder.named_parameters():
        owner = attention.holder.get_submodule(name.rpartition(".")[0])
        if any(owner is each for each in known) or tuple(parameter.shape) == (attention.size,):
            continue
        widths = [attention.heads * attention.size, attention.key_value_heads * attention.size]
        what = "a norm over all heads at once" if parameter.numel() in widths else "parameters besides its projections"
        raise Unsuitable(f"the attention of {kind} has {what}: '{name}' of {list(parameter.shape)}")


def _experts(layer: nn.Module) -> str | None:
    """The path of what keeps several networks' weights in a layer: in a list of experts, or stacked."""
    for name, child in layer.named_modules():
        stacked = any(parameter is not None and parameter.ndim > 2 for parameter in child._parameters.values())
        if name.rpartition(".")[2] == "experts" or (stacked and "conv" not in type(child).__name__.lower()):
            return name
    return None


def _projections(holder: nn.Module) -> dict[str, nn.Module]:
    """The children of a module that may be linear layers, or what another technique made of them."""
    return {
        name: child
        for name, child in holder.named_children()
        if not any(is_linear(part) for part in child.modules() if part is not child)
    }


def _has_others(holder: nn.Module, known: Iterable[nn.Module]) -> bool:
    """Whether a module has other parameters than those of some of its children."""
    own = {id(parameter) for child in known for parameter in child.parameters()}
    return any(id(parameter) not in own for parameter in holder.parameters())


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    outputs, inputs = plain_weight(layer).shape
    return (outputs, inputs) if is_transposed(layer) else (inputs, outputs)


def _named(path: str, layer: nn.Module, name: str) -> nn.Module:
    try:
        found = layer.get_submodule(name)
    except AttributeError:
        raise NotInModel(f"'{path}' has no '{name}'; {_there(layer)}") from None
    if not is_linear(found):
        raise NotInModel(f"'{path}.{name}' is a {type(found).__name__}, not a linear layer; {_there(layer)}")
    return found


def _parent(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])


def _there(layer: nn.Module) -> str:
    names = [name for name, child in layer.named_modules() if name and is_linear(child)]
    more = " and more" if len(names) > _MOST_NAMED else ""
    return f"its linear layers are {', '.join(names[:_MOST_NAMED])}{more}" if names else "it has no linear layers"
