"""Models of almost no size to call stages on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membench.plugins import Context, Model, Shape

if TYPE_CHECKING:
    from torch import nn

_SHAPE = Shape(64, 2, 4, 4, 128, 256, 256, False)


class Tiny(Model):
    """A decoder of 100,000 random weights in plain torch: two blocks of attention and a feed-forward network."""

    @property
    def shape(self) -> Shape:
        return _SHAPE

    def build(self, context: Context) -> nn.Module:
        return tiny_module(context.seed).to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return _decoder()

    def vocabulary(self, module: nn.Module) -> int:
        return _SHAPE.vocabulary


def tiny_module(seed: int = 0) -> nn.Module:
    """The module of ``Tiny``: token ids (B, T) below 256 to logits (B, T, 256).

    Its layers are ``embedding``, ``blocks.N.attention.query_key_value`` and ``.output``, ``blocks.N.mlp.0`` and ``.2``,
    norms and ``head``. In a suite it is the model ``factory`` with ``function = "membench.testing:tiny_module"``.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _decoder()


def tiny_transformer() -> Model:
    """transformers' own Llama in one layer, for what needs a key-value cache or transformers' names of layers."""
    from membench.builtin.models.transformer import Llama

    return Llama(size="15m").miniature()


def _decoder() -> nn.Module:
    from membench.worker.decoder import Decoder

    return Decoder(_SHAPE.width, _SHAPE.layers, _SHAPE.heads, _SHAPE.inner_width, _SHAPE.vocabulary)
