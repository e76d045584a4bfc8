"""What a transformers configuration says of a decoder's sizes, brought up to date when the decoder is cut.

A cut model generates by its configuration (which cache a layer has, how its fused projections are split), and is built
from it again. transformers' families write the same fact under different names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WIDTH = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers", "num_layers")
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
INNER_WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_dim", "hidden_dim",
               "encoder_ffn_dim", "decoder_ffn_dim")  # fmt: skip

_DEFAULT_INNER_WIDTH = ("n_inner", "intermediate_size", "ffn_hidden_size")
"""Where ``None`` means four times the width."""
_NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")
_STATED_BY_LAYER = ("layer_idx", "layer_type", "attention_type", "is_sliding", "sliding_window")


def text_config(module: nn.Module) -> Any:
    """The configuration of a model's decoder; ``None`` if it has none of transformers' kind."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def value_of(holder: Any, name: str, default: object = None) -> Any:
    """What an object has under a name; the default if it has none, or refuses to say.

    Gemma 4's configuration raises an error that is no ``AttributeError`` for what differs between layers.
    """
    try:
        return getattr(holder, name, default)
    except Exception:  # whatever transformers' families raise
        return default


def config_of(module: nn.Module, path: str) -> Any:
    """The configuration that states the sizes of the layers at a path: that of the decoder, or a vision tower's own.

    Modules of one class share the outermost one; an encoder and a decoder may have copies of it.
    """
    config = text_config(module)
    while config is not None and path:
        own = getattr(module.get_submodule(path), "config", None)
        if hasattr(own, "get_text_config"):
            return config if type(own) in (type(config), type(module.config)) else own
        path = path.rpartition(".")[0]
    return config


def number(holder: Any, names: Iterable[str]) -> int | None:
    """The first whole number that an object has under one of several names."""
    for name in names:
        value = value_of(holder, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def replace(holder: Any, names: Iterable[str], old: int, new: int) -> bool:
    """Set what an object says under any of several names from ``old`` to ``new``; a list where all entries say it, too.

    Returns:
        whether it said so.
    """
    found = False
    for name in names:
        value = value_of(holder, name)
        if isinstance(value, list | tuple) and value and all(each == old for each in value):
            found |= _set(holder, name, [new] * len(value))
        elif isinstance(value, int) and not isinstance(value, bool) and value == old:
            found |= _set(holder, name, new)
    return found


def describe_inner_width(config: Any, old: int, new: int, left_whole: Sequence[str] = ()) -> None:
    """Set the inner width, unless that states the width of layers that were left whole, too.

    Args:
        left_whole: paths of lists of layers that the configuration also describes, and of which some are as before.
    """
    if config is None or replace(config, _said_of_cut_alone(INNER_WIDTH, left_whole), old, new) or left_whole:
        return
    for name in _DEFAULT_INNER_WIDTH:
        if value_of(config, name, 0) is None:
            _set(config, name, new)
            return


def describe_heads(
    config: Any, old: tuple[int, int], new: tuple[int, int], size: int, left_whole: Sequence[str] = ()
) -> None:
    """Set the numbers of query heads and of key-value heads, and the size of a head, else read as width / heads.

    Args:
        left_whole: as for the inner width.
    """
    if config is None:
        return
    replace(config, _said_of_cut_alone(HEADS, left_whole), old[0], new[0])
    replace(config, _said_of_cut_alone(KEY_VALUE_HEADS, left_whole), old[1], new[1])
    if not left_whole and value_of(config, "head_dim") != size:
        _set(config, "head_dim", size)


def describe_layers(config: Any, path: str, old: int, kept: Sequence[int]) -> None:
    """Set the number of layers, and keep of all that is listed by layer what is of those that are left.

    Args:
        path: of the list that they are in, which tells an encoder's from a decoder's.
    """
    if config is None:
        return
    names: tuple[str, ...] = LAYERS
    if value_of(config, "is_encoder_decoder"):
        names = DECODER_LAYERS if "decoder" in path else ENCODER_LAYERS
    replace(config, names, old, len(kept))
    for name, value in list(vars(config).items()):
        if name in _NUMBERS_OF_LAYERS and value:
            _set(config, name, [kept.index(each) for each in value if each in kept])
        elif name in _FIRST_LAYERS and isinstance(value, int):
            _set(config, name, sum(each < value for each in kept))
        elif isinstance(value, list | tuple) and len(value) == old and ("layer" in name or name.endswith("_types")):
            _set(config, name, [value[each] for each in kept])
    if hasattr(config, "attention_types") and hasattr(config, "attention_layers"):  # GPT-Neo's short form of the same
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]


def outline(module: nn.Module) -> int:
    """A number that differs between modules of other classes, shapes, or places of layers; values do not count."""
    parts: set[object] = {
        (name, type(child).__name__, *(str(getattr(child, said, None)) for said in _STATED_BY_LAYER))
        for name, child in module.named_modules()
    }
    parts |= {(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}
    return hash(frozenset(parts))


def built_again(kind: type[nn.Module], config: Any) -> int:
    """The outline of a model that transformers builds from a configuration, as it would from a saved one."""
    import torch

    again = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return outline(kind(again))


def _said_of_cut_alone(names: Sequence[str], left_whole: Sequence[str]) -> list[str]:
    """The names under which a configuration states nothing of lists that were left whole."""
    if not left_whole:
        return list(names)
    others = tuple("decoder_" if "decoder" in path else "encoder_" for path in left_whole)
    return [name for name in names if name.startswith(("encoder_", "decoder_")) and not name.startswith(others)]


def _set(holder: Any, name: str, value: object) -> bool:
    """Set an attribute, unless it is a property that is only computed, or a configuration's own checks refuse it."""
    try:
        setattr(holder, name, value)
    except Exception:  # whatever transformers' families raise
        return False
    return True
