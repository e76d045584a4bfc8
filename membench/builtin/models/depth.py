"""How many layers a decoder has, and the same one with fewer, where all of them are alike."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from membench.builtin.techniques import decoder_config
from membench.builtin.techniques.decoder_layers import the_layer_list
from membench.plugins import Unsuitable

if TYPE_CHECKING:
    from torch import nn

_UNLIKE = ("mlp_only_layers", "first_k_dense_replace", "num_dense_layers", "moe_layers", "sliding_window_pattern",
           "attn_layer_indices", "full_attn_idxs", "decoder_sparse_step", "interleave_moe_layer_step")  # fmt: skip
"""Settings by which transformers' families make some layers differ from others, unless they are 0, 1 or empty."""


def of(config: Any) -> int | None:
    """Return the number of layers in a configuration of transformers; ``None`` if layers differ, or with an encoder."""
    if decoder_config.value_of(config, "is_encoder_decoder") or not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    layers = decoder_config.number(config, decoder_config.LAYERS)
    kinds = decoder_config.value_of(config, "layer_types") or ()
    if layers is None or len(set(kinds)) > 1:
        return None
    if any(decoder_config.value_of(config, name) not in (None, 0, 1, [], ()) for name in _UNLIKE):
        return None
    return layers


def cut(config: Any, layers: int) -> Any:
    """Return a configuration with the first layers alone."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    decoder_config.describe_layers(text, "", of(config) or layers, range(layers))
    return made


def of_module(module: nn.Module) -> int | None:
    """Return the number of layers of a module that has one list of them; ``None`` if they differ in class or shapes."""
    try:
        found = the_layer_list(module, None)
    except Unsuitable:
        return None
    kinds = {
        (type(layer), tuple((name, tensor.shape) for name, tensor in layer.state_dict().items()))
        for layer in found.layers
    }
    return len(found.layers) if len(kinds) == 1 else None


def cut_module(module: nn.Module, layers: int) -> None:
    """Take all layers but the first out of a module, and out of its configuration if it has one of transformers'.

    Raises:
        Unsuitable: if it has no list of like layers, or they cannot be taken out.
    """
    found = the_layer_list(module, None)
    found.keep(range(layers))
    config = decoder_config.config_of(module, found.path)
    decoder_config.describe_layers(config, found.path, len(found.layers), range(layers))
