"""transformers' architectures by name: configurations, classes, what they predict, and how they take token ids."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from membench.builtin.techniques.decoder_config import value_of
from membench.builtin.workloads.train import predicts_masked_tokens
from membench.errors import PluginError, did_you_mean, summary
from membench.plugins import Workload
from membench.worker.child_process import run_in_child

if TYPE_CHECKING:
    from torch import nn

Predicts: TypeAlias = Literal["next tokens", "masked tokens"]

_NEXT = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
_DEFAULTS = ("MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
_SMALL = {
    **dict.fromkeys(("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 192),
    **dict.fromkeys(("hidden_size", "embedding_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("head_dim", "d_kv"), 32),
    "num_experts_per_tok": 1,
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_MOST_SMALL_WEIGHTS = 10_000_000
_FEW_TOKENS = 16


def class_named(name: str) -> Any:
    """Return the class of models of a name.

    Raises:
        PluginError: if transformers has none of that name, with the nearest one.
    """
    import transformers

    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or getattr(found, "config_class", None) is None:
        raise PluginError(f"transformers has no architecture '{name}'; {did_you_mean(name, _known_classes())}")
    return found


def config_of_type(model_type: str, settings: Mapping[str, Any]) -> Any:
    """Return a configuration of a type such as 'llama', with some settings and the defaults of its class.

    Raises:
        PluginError: if transformers does not know the type, or refuses the settings.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        raise PluginError(
            f"transformers has no model type '{model_type}'; {did_you_mean(model_type, CONFIG_MAPPING_NAMES)}"
        )
    return config_of_class(CONFIG_MAPPING[model_type], settings)


def config_of_class(config_class: Any, settings: Mapping[str, Any]) -> Any:
    """Return a configuration of a class.

    Raises:
        PluginError: if transformers refuses the settings.
    """
    try:
        return config_class.from_dict(copy.deepcopy(dict(settings)))
    except Exception as error:
        raise PluginError(f"{config_class.__name__} refuses this: {_in_a_line(error)}") from None


def refuse_unknown_settings(config: Any, overrides: Mapping[str, Any], where: str) -> None:
    """Refuse settings that a configuration does not have: transformers keeps any name, without effect.

    Args:
        config: one of the same class, without the overrides.
        where: the name of the option.

    Raises:
        PluginError: with the nearest setting.
    """
    known = {name for name in (*vars(config), *config.attribute_map) if not name.startswith("_")}
    for name, value in overrides.items():
        if name not in known:
            raise PluginError(f"{where}: {type(config).__name__} has no '{name}'; {did_you_mean(name, known)}")
        part = value_of(config, name)
        if isinstance(value, Mapping) and hasattr(part, "attribute_map"):
            refuse_unknown_settings(part, value, f"{where}.{name}")


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with some replaced, and tables within them likewise."""
    found = dict(settings)
    for name, value in overrides.items():
        before = found.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        found[name] = overridden(before, value) if both else value  # type: ignore[arg-type]
    return found


def default_class(config: Any) -> Any:
    """Return the class for a configuration that names none: with a head for tokens where there is one.

    Raises:
        PluginError: if transformers has no class for it.
    """
    tasks = ("SEQ_TO_SEQ_CAUSAL_LM",) if config.is_encoder_decoder else _DEFAULTS
    for task in (*(f"FOR_{task}" for task in tasks), ""):
        for name in _flat([_classes_for(task).get(config.model_type, ())]):
            found = class_named(name)
            if isinstance(config, found.config_class):
                return found
    raise PluginError(f"transformers has no model for a {type(config).__name__}")


def refuse_without_token_ids(architecture: Any) -> None:
    """Refuse a class that takes images or sound.

    Raises:
        PluginError: naming what it takes.
    """
    if architecture.main_input_name != "input_ids":
        raise PluginError(f"{architecture.__name__} takes {architecture.main_input_name}, and workloads give token ids")


def predicts(architecture: Any) -> Predicts | None:
    """Return what the logits of a class are of; ``None`` if it has no head for tokens."""
    name = architecture.__name__
    if predicts_masked_tokens(architecture):
        return "masked tokens"
    heads = {each for task in _NEXT for each in _flat(_classes_for(f"FOR_{task}").values())}
    return "next tokens" if name in heads or name.endswith(("ForCausalLM", "LMHeadModel")) else None


def unsuitable(architecture: Any, workload: Workload) -> str | None:
    """Return why a workload makes no sense with a class; ``None`` if it does."""
    generates, head = workload.decoded_tokens_per_step() is not None, predicts(architecture)
    if head is None and (workload.trains or generates):
        what = "train it by" if workload.trains else "generate with"
        return f"{architecture.__name__} has no head that predicts tokens: there is nothing to {what}"
    if head == "masked tokens" and generates:
        return f"{architecture.__name__} predicts masked tokens and generates none"
    return None


def unjudged(architecture: Any, module: Any) -> str | None:
    """Return why the loss of the next tokens says nothing about a class; ``None`` if it does.

    Args:
        module: one of that class; a decoder alone, such as a BartForCausalLM, says so in a configuration of its own.
    """
    if predicts(architecture) == "masked tokens":
        return f"{architecture.__name__} predicts masked tokens, and held-out text is judged by its next tokens"
    if module.config.is_encoder_decoder:
        return "the encoder reads the text that the decoder predicts"
    return None


def made(architecture: Any, config: Any) -> nn.Module:
    """Build a module in fp32 with random weights, on torch's default device.

    Raises:
        PluginError: if transformers cannot build it.
    """
    import torch

    try:
        module: nn.Module = architecture._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise PluginError(f"{architecture.__name__} cannot be built: {_in_a_line(error)}") from error
    return taking_token_ids(module)


def taking_token_ids(module: Any) -> nn.Module:
    """Return a module that runs on token ids alone: a decoder beside an encoder gets the same ids."""
    if module.config.is_encoder_decoder:
        module.register_forward_pre_hook(_feed_decoder, with_kwargs=True)
    found: nn.Module = module
    return found


_FOR_DECODER = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})


def _feed_decoder(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    return given, ({**named, "decoder_input_ids": given[0]} if given and not _FOR_DECODER & named.keys() else named)


def shrunk(architecture: Any, config: Any) -> Any | None:
    """Return a configuration of few narrow layers, one of each kind at least, else like another.

    ``None`` if the class takes no such one, or does not run with it: some sizes follow from others.
    """
    import torch

    for keeps_others in (True, False):
        try:
            found = config_of_class(type(config), _small_settings(config, keeps_others=keeps_others))
            with torch.device("meta"):
                module = made(architecture, found)
            if sum(parameter.numel() for parameter in module.parameters()) <= _MOST_SMALL_WEIGHTS:
                run_in_child(functools.partial(_run, architecture, found))
                return found
        except Exception:  # whatever transformers' families raise
            continue
    return None


def _run(architecture: Any, config: Any) -> dict[str, list[Any]]:
    """Run a class on a few token ids, on the CPU, as many classes look at values; without threads, after a fork."""
    import torch

    torch.set_num_threads(1)
    with torch.device("cpu"), torch.no_grad():
        made(architecture, config).eval()(torch.arange(_FEW_TOKENS)[None])
    return {}


def _small_settings(config: Any, *, keeps_others: bool) -> dict[str, Any]:
    """Return a configuration's settings with the sizes of a small model, in its parts, too."""
    settings = config.to_dict() if keeps_others else {}
    layers = value_of(config, "num_hidden_layers")
    by_layer = {name: value for name, value in settings.items() if isinstance(value, list) and len(value) == layers}
    kept = _first_of_each_kind(list(by_layer.values()))
    settings |= {name: [value[place] for place in kept] for name, value in by_layer.items()}
    sizes = {**_SMALL, "num_hidden_layers": len(kept)}
    known = {*vars(config), *config.attribute_map}
    small = {
        name: size
        for name, size in sizes.items()
        if name in known and (value := value_of(config, name)) is not None and not _is_small_id(name, value)
    }
    if "qk_rope_head_dim" in known:  # the size of heads follows from that of their parts
        small.pop("head_dim", None)
    for alias in small:
        settings.pop(config.attribute_map.get(alias, ""), None)
    parts = {
        name: _small_settings(part, keeps_others=keeps_others)
        for name, part in vars(config).items()
        if hasattr(part, "attribute_map")
    }
    return {**settings, **small, **parts}


def _is_small_id(name: str, value: Any) -> bool:
    """Return whether a setting is the id of a token that a small model has, too. RoBERTa's positions follow one."""
    return name.endswith("_token_id") and isinstance(value, int) and 0 <= value < _SMALL["vocab_size"]


def _first_of_each_kind(by_layer: Sequence[Sequence[Any]]) -> list[int]:
    """Return the places of layers of every kind, two at least; the first layer stands for a second one if need be.

    Args:
        by_layer: lists with an entry a layer; those of names, as of kinds of attention, tell the kind.
    """
    layers = len(by_layer[0]) if by_layer else 2
    kinds = list(zip(*(each for each in by_layer if all(isinstance(entry, str) for entry in each)), strict=True))
    first = sorted({kinds.index(kind) for kind in kinds})
    return first if len(first) > 1 else [0, min(1, layers - 1)]


def _classes_for(task: str) -> Mapping[str, Any]:
    """Return transformers' own table of classes by model type, for a task such as 'FOR_CAUSAL_LM'; '': without head."""
    from transformers.models.auto import modeling_auto

    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_{task}{'_' if task else ''}MAPPING_NAMES", {})
    return found


def _flat(names: Iterable[str | Iterable[str]]) -> list[str]:
    return [each for found in names for each in ((found,) if isinstance(found, str) else found)]


def _known_classes() -> set[str]:
    tasks = ("", "FOR_PRETRAINING", *(f"FOR_{task}" for task in (*_NEXT, "MASKED_LM")))
    return {each for task in tasks for each in _flat(_classes_for(task).values())}


def _in_a_line(error: Exception) -> str:
    return summary(Exception(" ".join(str(error).split()))).partition(": ")[2] or type(error).__name__
