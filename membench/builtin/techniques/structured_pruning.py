"""Whole channels, heads and layers taken out, so that every tensor that is left is a smaller plain one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from membench.builtin.techniques import decoder_config, head_layout, projections
from membench.builtin.techniques.cut_check import (
    Probe,
    passed_by,
    refuse_idle,
    unchanged,
    without_inputs,
)
from membench.builtin.techniques.decoder_layers import (
    LayerList,
    layer_lists,
    left_whole,
    outermost_named,
    the_layer_list,
    whole_list,
)
from membench.builtin.techniques.importance import Part, influences, magnitudes, taylor
from membench.builtin.techniques.pruning import Pruning, is_transposed
from membench.errors import summary
from membench.plugins import Context, Setting, Shape, Unsuitable
from membench.worker.rehearsal_model import RehearsalModel

if TYPE_CHECKING:
    from torch import nn


class _Structured(Pruning):
    share: float = Field(0.5, gt=0, lt=1)
    layers: str | None = Field(None, min_length=1)
    """A pattern over the paths of the layers, such as 'encoder.blocks.*'; by default the lists of layers there are."""
    units: ClassVar[str]
    """What is taken out, in the plural."""
    names_of_parts: ClassVar[tuple[str, ...]] = ("layers",)
    """The options that name parts of a model."""
    _outline: tuple[type, int] | None = PrivateAttr(None)

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

    def for_rehearsal(self, module: nn.Module, context: Context) -> Self:
        """This technique, without names of a model's parts where the case is rehearsed on a model of other parts."""
        has_layers = self.layers is None or bool(outermost_named(module, self.layers))
        if not context.rehearsal or (has_layers and not isinstance(context.model, RehearsalModel)):
            return self
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.names_of_parts})

    def remember(self, module: nn.Module) -> None:
        """Remember what the cut module is like, if transformers is to build it again from its configuration."""
        if decoder_config.text_config(module) is not None:
            self._outline = type(module), decoder_config.outline(module)

    def remark(self, module: nn.Module, context: Context) -> str | None:
        if self._outline is None or (config := getattr(module, "config", None)) is None:
            return None
        kind, outline = self._outline
        try:
            if decoder_config.built_again(kind, config) == outline:
                return None
            reason = "it says nothing of such sizes"
        except Exception as error:
            reason = summary(error)
        return (
            f"left a {kind.__name__} that transformers cannot build from its configuration ({reason}): a checkpoint is"
            " read into a module that was cut alike"
        )

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

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        technique = self.for_rehearsal(module, context)
        lists = layer_lists(module, technique.layers)
        probe = Probe(_body(module), context.model.vocabulary(module), context)
        refuse_idle(module, lists, probe)
        technique.cut(module, lists, probe, context)
        self.remember(module)
        self.recover(module, context)
        return module

    def cut(self, module: nn.Module, lists: Sequence[LayerList], probe: Probe, context: Context) -> None:
        """Take the least important groups out of each layer's part, and say so in modules and configuration."""
        raise NotImplementedError

    def chosen(self, parts: Sequence[Part], module: nn.Module, context: Context) -> list[list[int]]:
        """By part its groups that stay. Parts have the same share of their groups taken out."""
        projections.refuse_shared(module, parts)
        return [self.kept(scores, context) for scores in self.score(parts, module, context)]


class PruneFfn(_Sliced):
    """Takes the least important channels out of every feed-forward layer; the matrices become really smaller.

    A channel is a row of the matrices that lead into the inner width and a column of the one that leads out. Each
    layer loses the same share, so that the configuration (``intermediate_size``, GPT-2's ``n_inner``) still describes
    the model. ``importance = "magnitude"`` is the Euclidean norm of a channel's weights, ``"taylor"`` is Σ |w·∂L/∂w|
    over them on 32 pieces of 2 × 128 tokens of the training text (Molchanov et al., 2019, arXiv:1906.10771).

    transformers' decoders are taken apart by the standard names of their projections. For others, ``layers`` is a
    pattern of their layers' paths, and ``up`` and ``down`` are paths within a layer: of what leads into the inner width
    and of what leads out. The cut model runs on four tokens and must give what the whole one gives with these channels
    silent, or the case is skipped with the reason.

    Limits: no mixtures of experts. Embeddings and attention stay whole, so the model loses less than the share. Where a
    configuration cannot say the inner width (Bloom, MPT: always four times the width), a remark says so.
    """

    acts_on: ClassVar[str] = "weights, activations"
    units: ClassVar[str] = "feed-forward channels"
    names_of_parts: ClassVar[tuple[str, ...]] = ("layers", "up", "down")
    up: tuple[str, ...] = ()
    down: str | None = Field(None, min_length=1)

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.inner_width

    def check(self, setting: Setting) -> str | None:
        if bool(self.up) != bool(self.down):
            return "up and down name the two ends of a feed-forward network: give both or neither"
        return super().check(setting)

    def cut(self, module: nn.Module, lists: Sequence[LayerList], probe: Probe, context: Context) -> None:
        networks = [
            projections.feed_forward(path, layer, self.up, self.down) for each in lists for path, layer in each.named()
        ]
        widths = [network.width for network in networks]
        parts = [network.part() for network in networks]
        kept = self.chosen(parts, module, context)
        with _checked(probe, parts, kept):
            for network, part, channels, width in zip(networks, parts, kept, widths, strict=True):
                _keep(part, channels)
                network.describe(width)
            for config, whole, places in _by_config(module, lists):
                if len({widths[place] for place in places}) == 1:
                    old, new = widths[places[0]], networks[places[0]].width
                    decoder_config.describe_inner_width(config, old, new, whole)


class PruneHeads(_Sliced):
    """Takes the least important attention heads out of every layer, with the keys and values that they use.

    A head is its rows of the query, key and value matrices and its columns of the output matrix (doing without heads:
    Michel et al., 2019, arXiv:1905.10650). Where heads share keys and values (grouped queries), they go together. The
    key-value cache shrinks with them. Each layer loses the same share, so that the configuration
    (``num_attention_heads``, ``num_key_value_heads``, ``head_dim``) still describes the model. ``importance``,
    ``layers`` and the check of the cut model are those of ``prune-ffn``. ``qkv`` are paths within a layer: of the
    query, key and value projections, or of the one that is all three; ``output`` is the path of the output projection.

    Limits: no heads whose positions are biased head by head (ALiBi), whose norms go over all heads, or whose keys and
    values come from a common latent; not ``nn.MultiheadAttention``. The module runs, but transformers builds another
    from its configuration only if that has a size of heads, and if the width is divisible by the heads that are left;
    a remark says where it cannot. Embeddings and feed-forward layers stay whole: the model loses less than the share.
    """

    acts_on: ClassVar[str] = "weights, cache"
    units: ClassVar[str] = "key-value heads"
    names_of_parts: ClassVar[tuple[str, ...]] = ("layers", "qkv", "output", "heads")
    qkv: tuple[str, ...] = ()
    output: str | None = Field(None, min_length=1)
    heads: int | None = Field(None, ge=1)

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.key_value_heads

    def check(self, setting: Setting) -> str | None:
        if bool(self.qkv) != bool(self.output):
            return "qkv and output name the two ends of an attention: give both or neither"
        if len(self.qkv) not in (0, 1, 3):
            return f"qkv names the query, key and value projections, or one that is all three: not {len(self.qkv)}"
        return super().check(setting)

    def cut(self, module: nn.Module, lists: Sequence[LayerList], probe: Probe, context: Context) -> None:
        config = decoder_config.text_config(module)
        named = {"qkv": self.qkv, "output": self.output, "heads": self.heads}
        attentions = [
            projections.attention(path, layer, decoder_config.config_of(module, each.path), named)
            for each in lists
            for path, layer in each.named()
        ]
        if head_layout.is_biased_by_head(attentions[0], config):
            raise Unsuitable(
                f"a {type(module).__name__} biases positions head by head (ALiBi): heads are not exchangeable"
            )
        layout = head_layout.found_by_silencing(probe, attentions[0])
        parts = [attention.part(layout) for attention in attentions]
        kept = self.chosen(parts, module, context)
        with _checked(probe, parts, kept):
            for attention, part, heads in zip(attentions, parts, kept, strict=True):
                _keep(part, heads)
                attention.describe(len(heads))
            for stated, whole, places in _by_config(module, lists):
                alike = [attentions[place] for place in places]
                head_layout.describe_heads(stated, alike, len(kept[places[0]]), whole)


class DropLayers(_Structured):
    """Takes out the layers that change least what passes through them, measured on text.

    Block influence (Men et al., 2024, ShortGPT, arXiv:2403.03853): 1 − cos(input, output), mean over 32 pieces of
    2 × 128 tokens of the training text. The layers with the least go; all are measured before any is gone. The others
    are numbered anew, so that the key-value cache has no holes. ``layers`` is a pattern of the layers' paths where a
    model has more than one list of them. What is left must give what the whole model gives with these layers passed by.

    Limits: embeddings stay whole, so the model loses less than the share.
    """

    acts_on: ClassVar[str] = "weights, activations, cache"
    units: ClassVar[str] = "layers"

    @staticmethod
    def unit_count(shape: Shape) -> int:
        return shape.layers

    def nominal_share(self) -> float | None:
        return 1 - self.share if self.layers is None else None  # else of some of the layers

    @property
    def changes_weights(self) -> bool:
        return self.recover_steps > 0

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        found = the_layer_list(module, self.for_rehearsal(module, context).layers)
        whole = whole_list(module, found)
        body, config = _body(module), decoder_config.config_of(module, found.path)
        for name, reason in _TIED_TO_PLACES.items():
            if value := decoder_config.value_of(config, name):
                raise Unsuitable(f"{name} = {value}: {reason}")
        kept = self.kept(influences(found.layers, body, context), context)
        gone = [layer for place, layer in enumerate(found.layers) if place not in kept]
        left = [place for place, layer in enumerate(whole.layers) if not any(layer is each for each in gone)]
        stay = [found.layers[place] for place in kept]
        probe = Probe(body, context.model.vocabulary(module), context)
        with unchanged(probe, stay, lambda: [passed_by(layer) for layer in gone]):
            found.keep(kept)
            for place, old_place in enumerate(left):
                for part in whole.layers[old_place].modules():
                    if isinstance(getattr(part, "layer_idx", None), int):
                        part.layer_idx = place  # type: ignore[assignment]  # a number in transformers' modules
            decoder_config.describe_layers(config, whole.path, len(whole.layers), left)
        self.remember(module)
        self.recover(module, context)
        return module


_TIED_TO_PLACES = {
    "num_kv_shared_layers": "layers use keys and values of others, so none is taken out",
    "scale_attn_by_inverse_layer_idx": "a layer's place is part of what it computes, so none is taken out",
}


def _body(module: Any) -> nn.Module:
    """The module without its output head, where transformers' conventions tell."""
    body: nn.Module = getattr(module, "base_model", module)
    return body


def _by_config(module: nn.Module, lists: Sequence[LayerList]) -> Iterator[tuple[Any, list[str], list[int]]]:
    """The configurations that describe layers.

    Yields:
        a configuration, the paths of lists that it describes and that are not among these layers (or not as a whole),
        and the places of those that are, of all layers in order.
    """
    paths = [each.path for each in lists for _ in each.layers]
    configs = {path: decoder_config.config_of(module, path) for path in paths}
    others = {path: decoder_config.config_of(module, path) for path in left_whole(module, lists)}
    for config in {id(config): config for config in configs.values()}.values():
        yield (
            config,
            [path for path, other in others.items() if other is config],
            [place for place, path in enumerate(paths) if configs[path] is config],
        )


def _checked(probe: Probe, parts: Sequence[Part], kept: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
    """Check that cutting parts down is the same as silencing their other groups as inputs of each part's last layer."""
    import torch

    last = [part[-1] for part in parts]

    def silence() -> list[Any]:
        hooks = []
        for side, stays in zip(last, kept, strict=True):
            goes = torch.ones(len(side.groups), dtype=torch.bool)
            goes[list(stays)] = False
            hooks.append(without_inputs(side.layer, side.groups[goes].flatten()))
        return hooks

    layers = [side.layer for side in last]
    return unchanged(probe, layers, silence)


def _keep(part: Part, kept: Sequence[int]) -> None:
    """Cut the sides of layers down to some of their groups."""
    from torch import nn

    for side in part:
        layer: Any = side.layer
        # In the order of the indices, not of the groups: a fused layer's queries come before its keys.
        indices = side.groups[list(kept)].flatten().sort().values
        for name, (parameter, axis) in zip(("weight", "bias"), list(side.parameters()), strict=False):
            smaller = parameter.detach().index_select(axis, indices.to(parameter.device))
            setattr(layer, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
        sizes = ("nx", "nf") if is_transposed(layer) else ("in_features", "out_features")
        setattr(layer, sizes[0 if side.of_inputs else 1], len(indices))
