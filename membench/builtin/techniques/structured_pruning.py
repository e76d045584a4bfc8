"""Whole channels, heads and layers taken out, so that every tensor that is left is a smaller plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from membench.builtin.techniques.importance import Part, Slice, influences, magnitudes, taylor
from membench.builtin.techniques.pruning import Pruning, is_transposed
from membench.plugins import Context, Setting, Shape, Unsuitable

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Structured(Pruning):
    share: float = Field(0.5, gt=0, lt=1)
    units: ClassVar[str]
    """What is taken out, in the plural."""

    @staticmethod
    def unit_count(shape: Shape) -> int:
        """How many units there are, of which a share goes."""
        raise NotImplementedError

    def check(self, setting: Setting) -> str | None:
        shape = setting.model.shape
        return self._wrong(self.unit_count(shape)) if shape else None

    def kept(self, scores: Sequence[float], context: Context) -> list[int]:
        """Positions of the units that stay, in order: the share with the lowest scores goes.

        Raises:
            Unsuitable: if all would go, or none. A rehearsal's miniature may be that small; it keeps what it must.
        """
        wrong = self._wrong(len(scores))
        if wrong and not context.rehearsal:
            raise Unsuitable(wrong)
        gone = min(self._removed(len(scores)), len(scores) - 1)
        by_score = sorted(range(len(scores)), key=scores.__getitem__)
        return sorted(by_score[gone:])

    def _removed(self, count: int) -> int:
        return round(self.share * count)

    def _wrong(self, count: int) -> str | None:
        removed = self._removed(count)
        if 0 < removed < count:
            return None
        return f"share = {self.share:g} takes out {'all' if removed else 'none'} of {count} {self.units}"


class _Sliced(_Structured):
    importance: Literal["magnitude", "taylor"] = "magnitude"

    def nominal_share(self) -> float | None:
        return None  # what the share is of is a share of the weights that differs from model to model

    def score(self, parts: Sequence[Part], module: nn.Module, context: Context) -> list[list[float]]:
        """By part the importance of each of its groups."""
        if self.importance == "taylor":
            return [score.tolist() for score in taylor(parts, module, context)]
        return [magnitudes(part).tolist() for part in parts]

    def cut(self, parts: Sequence[Part], module: nn.Module, context: Context) -> None:
        """Take the least important groups out of each part; the parts have as many groups and lose as many."""
        for part, scores in zip(parts, self.score(parts, module, context), strict=True):
            kept = self.kept(scores, context)
            for side in part:
                _keep(side, kept)


class PruneFfn(_Sliced):
    """Takes the least important channels out of every feed-forward layer; the matrices become really smaller.

    A channel is a row of the matrices that lead into the inner width and a column of the one that leads out. Each
    layer loses the same share, so that the configuration (``intermediate_size``, GPT-2's ``n_inner``) still describes
    the model. ``importance = "magnitude"`` is the Euclidean norm of a channel's weights, ``"taylor"`` is Σ |w·∂L/∂w|
    over them on 32 pieces of 2 × 128 tokens of the training text (Molchanov et al., 2019, arXiv:1906.10771).

    Limits: Llama, Qwen2 and GPT-2. Embeddings and attention stay whole, so the model loses less than the share.
    """

    acts_on: ClassVar[str] = "weights, activations"
    units: ClassVar[str] = "feed-forward channels"

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.inner_width

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        decoder = _decoder(module)
        self.cut([decoder.channels(block) for block in decoder.blocks], module, context)
        decoder.describe_channels()
        self.recover(module, context)
        return module


class PruneHeads(_Sliced):
    """Takes the least important attention heads out of every layer, with the keys and values that they use.

    A head is its rows of the query, key and value matrices and its columns of the output matrix (doing without heads:
    Michel et al., 2019, arXiv:1905.10650). Where heads share keys and values (grouped queries), they go together. The
    key-value cache shrinks with them. Each layer loses the same share, so that the configuration
    (``num_attention_heads``, ``num_key_value_heads``, ``head_dim``) still describes the model. Importance is as for
    ``prune-ffn``.

    Limits: Llama, Qwen2 and GPT-2. The module runs, but transformers builds another from its configuration only if the
    width is divisible by the heads that are left, and for GPT-2 never: there a head is always width / heads wide.
    Embeddings and feed-forward layers stay whole, so the model loses less than the share.
    """

    acts_on: ClassVar[str] = "weights, cache"
    units: ClassVar[str] = "key-value heads"

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.key_value_heads

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        decoder = _decoder(module)
        self.cut([decoder.heads(block) for block in decoder.blocks], module, context)
        decoder.describe_heads()
        self.recover(module, context)
        return module


class DropLayers(_Structured):
    """Takes out the layers that change least what passes through them, measured on text.

    Block influence (Men et al., 2024, ShortGPT, arXiv:2403.03853): 1 − cos(input, output), mean over 32 pieces of
    2 × 128 tokens of the training text. The layers with the least go; all are measured before any is gone. The others
    are numbered anew, so that the key-value cache has no holes.

    Limits: Llama, Qwen2 and GPT-2. Embeddings stay whole, so the model loses less than the share.
    """

    acts_on: ClassVar[str] = "weights, activations, cache"
    units: ClassVar[str] = "layers"

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.layers

    def nominal_share(self) -> float | None:
        return 1 - self.share

    @property
    def changes_weights(self) -> bool:
        return self.recover_steps > 0

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        decoder = _decoder(module)
        decoder.keep_blocks(self.kept(influences(decoder.blocks, decoder.body, context), context))
        self.recover(module, context)
        return module


class _Llama:
    """Llama's and Qwen2's parts, and what in them and in the configuration describes their sizes."""

    def __init__(self, module: Any) -> None:
        self.config = module.config
        self.body = module.model

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.body.layers)

    def channels(self, block: Any) -> Part:
        mlp = block.mlp
        one_each = _groups(mlp.intermediate_size, 1)
        return [
            Slice(mlp.gate_proj, False, one_each),
            Slice(mlp.up_proj, False, one_each),
            Slice(mlp.down_proj, True, one_each),
        ]

    def heads(self, block: Any) -> Part:
        attention = block.self_attn
        size = attention.head_dim
        count = attention.k_proj.out_features // size
        queries, keys = _groups(count, attention.num_key_value_groups * size), _groups(count, size)
        return [
            Slice(attention.q_proj, False, queries),
            Slice(attention.k_proj, False, keys),
            Slice(attention.v_proj, False, keys),
            Slice(attention.o_proj, True, queries),
        ]

    def describe_channels(self) -> None:
        for block in self.body.layers:
            block.mlp.intermediate_size = block.mlp.down_proj.in_features
        self.config.intermediate_size = self.body.layers[0].mlp.intermediate_size

    def describe_heads(self) -> None:
        attention = self.body.layers[0].self_attn
        self.config.head_dim = attention.head_dim  # else it would be read as width / heads
        self.config.num_attention_heads = attention.q_proj.out_features // attention.head_dim
        self.config.num_key_value_heads = attention.k_proj.out_features // attention.head_dim

    def keep_blocks(self, kept: Sequence[int]) -> None:
        _keep_blocks(self.body.layers, kept, lambda block: block.self_attn)
        self.config.num_hidden_layers = len(kept)
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = [self.config.layer_types[position] for position in kept]


class _Gpt2:
    """GPT-2's parts: transposed linear layers, and queries, keys and values beside each other in one of them."""

    def __init__(self, module: Any) -> None:
        self.config = module.config
        self.body = module.transformer

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.body.h)

    def channels(self, block: Any) -> Part:
        one_each = _groups(block.mlp.c_fc.nf, 1)
        return [Slice(block.mlp.c_fc, False, one_each), Slice(block.mlp.c_proj, True, one_each)]

    def heads(self, block: Any) -> Part:
        import torch

        attention = block.attn
        count, size = attention.num_heads, attention.head_dim
        fused = torch.arange(3 * count * size).view(3, count, size).transpose(0, 1).reshape(count, 3 * size)
        return [Slice(attention.c_attn, False, fused), Slice(attention.c_proj, True, _groups(count, size))]

    def describe_channels(self) -> None:
        self.config.n_inner = self.body.h[0].mlp.c_fc.nf

    def describe_heads(self) -> None:
        for block in self.body.h:
            block.attn.split_size = block.attn.c_proj.nx
            block.attn.num_heads = block.attn.split_size // block.attn.head_dim
        self.config.n_head = self.body.h[0].attn.num_heads

    def keep_blocks(self, kept: Sequence[int]) -> None:
        _keep_blocks(self.body.h, kept, lambda block: block.attn)
        self.config.n_layer = len(kept)


_DECODERS: dict[str, type[_Llama | _Gpt2]] = {
    "LlamaForCausalLM": _Llama,
    "Qwen2ForCausalLM": _Llama,
    "GPT2LMHeadModel": _Gpt2,
}


def _decoder(module: nn.Module) -> _Llama | _Gpt2:
    kind = type(module).__name__
    if kind not in _DECODERS:
        raise Unsuitable(f"the parts of a {kind} are not known; those of {', '.join(_DECODERS)} are")
    return _DECODERS[kind](module)


def _groups(count: int, size: int) -> torch.Tensor:
    """Neighbours in groups: (count, size) of indices."""
    import torch

    return torch.arange(count * size).view(count, size)


def _keep(side: Slice, kept: Sequence[int]) -> None:
    """Cut a layer's side down to some of its groups."""
    from torch import nn

    layer: Any = side.layer
    # In the order of the indices, not of the groups: a fused layer's queries come before its keys.
    indices = side.groups[list(kept)].flatten().sort().values
    for name, (parameter, axis) in zip(("weight", "bias"), list(side.parameters()), strict=False):
        smaller = parameter.detach().index_select(axis, indices.to(parameter.device))
        setattr(layer, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    sizes = ("nx", "nf") if is_transposed(layer) else ("in_features", "out_features")
    setattr(layer, sizes[0 if side.of_inputs else 1], len(indices))


def _keep_blocks(blocks: nn.ModuleList, kept: Sequence[int], attention: Callable[[Any], Any]) -> None:
    """Take out the other blocks; each attention layer's place in the key-value cache is its place among those left."""
    for position in reversed(range(len(blocks))):
        if position not in kept:
            del blocks[position]
    for position, block in enumerate(blocks):
        attention(block).layer_idx = position
