"""Channels, heads and layers taken out of transformers' decoders of many families.

What is left is held against the whole model, in which what is gone is zero. Which parts those are is read off the cut
model's own weights, so that nothing of how it was cut is used.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from membench.plugins import Context, Model, Technique, Unsuitable, registry

if TYPE_CHECKING:
    import torch
    from torch import nn

_LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_HEADS_OF_ALL = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_FALCON = {**_HEADS_OF_ALL, "ffn_hidden_size": 40}
_TWO_KINDS = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT_2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 6, "pad_token_id": 0}
_EXPERTS = {**_LLAMA, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT = {
    **_EXPERTS, "num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 2,
}  # fmt: skip

_DECODERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "gpt2": ("GPT2", {**_GPT_2, "n_inner": 40}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 8}),
    "gemma": ("Gemma", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_LLAMA, **_TWO_KINDS}),
    "gemma3": ("Gemma3Text", {**_LLAMA, **_TWO_KINDS}),
    "phi": ("Phi", _LLAMA),
    "phi3": ("Phi3", _LLAMA),
    "gpt-neox": ("GPTNeoX", _HEADS_OF_ALL),
    "gpt-neo": ("GPTNeo", {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_layers": 4,
                           "num_heads": 6, "window_size": 8, "max_position_embeddings": 64, "pad_token_id": 0,
                           "attention_types": [[["global", "local"], 2]]}),
    "gptj": ("GPTJ", {**_GPT_2, "rotary_dim": 4}),
    "falcon, a key for all": ("Falcon", _FALCON),
    "falcon, a key each": ("Falcon", {**_FALCON, "multi_query": False}),
    "falcon, grouped": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3}),
    "opt": ("OPT", {**_HEADS_OF_ALL, "ffn_dim": 40, "word_embed_proj_dim": 48}),
    "bloom": ("Bloom", {**_GPT_2, "hidden_size": 48}),
    "mpt": ("Mpt", {"vocab_size": 96, "d_model": 48, "n_layers": 4, "n_heads": 6, "max_seq_len": 64}),
    "olmo": ("Olmo", _LLAMA),
    "olmo2": ("Olmo2", _LLAMA),
    "starcoder2": ("Starcoder2", _LLAMA),
    "bigcode": ("GPTBigCode", {**_GPT_2, "n_inner": 40, "multi_query": False}),
    "codegen": ("CodeGen", {**_GPT_2, "n_embd": 64, "n_head": 8, "rotary_dim": 4}),
    "cohere": ("Cohere", _LLAMA),
    "glm": ("Glm", {**_LLAMA, "head_dim": 8}),
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8, "num_experts": 4}),
    "gpt-oss": ("GptOss", {**_EXPERTS, "head_dim": 8, "num_local_experts": 4}),
    "deepseek-v3": ("DeepseekV3", _LATENT),
}  # fmt: skip

_INNER_WIDTH = {"gptj": 4 * 48, "bloom": 4 * 48, "mpt": 4 * 48, "codegen": 4 * 64}
"""Where the configuration says nothing of it."""
_REFUSED = {
    ("prune-ffn", "mixtral"): r"'model\.layers\.0' .* is a mixture of experts, 'mlp\.experts'",
    ("prune-ffn", "qwen3-moe"): "is a mixture of experts",
    ("prune-ffn", "gpt-oss"): "is a mixture of experts",
    ("prune-ffn", "deepseek-v3"): r"'model\.layers\.2' .* is a mixture of experts",
    ("prune-heads", "falcon, a key for all"): r"takes out none of 1 key-value heads",
    ("prune-heads", "bloom"): "biases positions head by head",
    ("prune-heads", "mpt"): "biases positions head by head",
    ("prune-heads", "olmo2"): r"a norm over all heads at once: 'q_norm\.weight' of \[48\]",
    ("prune-heads", "gpt-oss"): r"parameters besides its projections: 'sinks' of \[6\]",
    ("prune-heads", "deepseek-v3"): r"no attention of known names: .* its linear layers are self_attn\.q_a_proj",
    # Its projection has queries, values and keys of four parts of the model one after the other.
    ("prune-heads", "codegen"): "would compute something else with these parts taken out",
}
_NOT_IN_A_CONFIGURATION = {
    "prune-ffn": {"bloom", "mpt"},
    "prune-heads": {
        "gpt2", "gpt-neox", "gpt-neo", "gptj", "opt", "falcon, a key each", "falcon, grouped", "bigcode",
    },
    "drop-layers": set(),
}  # fmt: skip
"""Where transformers has the inner width be four times the width, or a head be width / heads wide."""


class _Named(Model):
    """What techniques ask a model for, where the module is made by hand."""

    def build(self, context: Context) -> nn.Module:
        raise NotImplementedError

    def max_tokens(self) -> int:
        return 32


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers.models.auto.modeling_auto  # noqa: F401
    import torch

    from membench.builtin.techniques import importance

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_PIECES", 2)
        yield
    torch.set_num_threads(threads)


def _context(rehearsal: bool = False) -> Context:
    return Context("cpu", 0, _Named(), lambda name: contextlib.nullcontext(), {}, Path(), rehearsal=rehearsal)


def _technique(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _built(decoder: str) -> Any:
    """A model in which no bias is zero, nor any two parameters alike."""
    import torch
    import transformers

    family, options = _DECODERS[decoder]
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options))
    return _unlike(module.eval())


def _unlike(module: nn.Module) -> Any:
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def _ids() -> torch.Tensor:
    import torch

    return torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(3))


def _logits(module: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    with torch.no_grad():
        output = module(_ids() if ids is None else ids)
        return cast("torch.Tensor", getattr(output, "logits", output))


def _cached_logits(module: Any) -> torch.Tensor:
    """The same, a prompt of ten tokens first and then one token after the other, through the key-value cache."""
    import torch

    found, cache = [], None
    with torch.no_grad():
        for piece in [_ids()[:, :10], *(_ids()[:, place : place + 1] for place in range(10, 20))]:
            output = module(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return torch.cat(found, dim=1)


def _matrix(layer: Any) -> torch.Tensor:
    """The weight of a linear layer as (outputs, inputs)."""
    weight = layer.weight.detach()
    return cast("torch.Tensor", weight.t() if type(layer).__name__ == "Conv1D" else weight)


def _with_zeros(whole: nn.Module, cut: nn.Module) -> int:
    """Set to zero in the whole model what layers of the cut one do not take in any more, and say how many inputs."""
    left, gone = dict(cut.named_modules()), 0
    for name, layer in whole.named_modules():
        if type(layer).__name__ not in ("Linear", "Conv1D", "FalconLinear"):
            continue
        before, after = _matrix(layer), _matrix(left[name])
        if before.shape[1] != after.shape[1]:
            stays = (before[:, :, None] == after[:, None, :]).all(0).any(1)
            assert int(stays.sum()) == after.shape[1]
            before[:, ~stays] = 0
            gone += int((~stays).sum())
    return gone


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("technique", ["prune-ffn", "prune-heads"])
@pytest.mark.parametrize("decoder", _DECODERS)
def test_a_decoder_without_parts_computes_what_the_whole_does_with_these_parts_zero(
    decoder: str, technique: str, tmp_path: Path
) -> None:
    member, module = _technique(technique, share=0.35), _built(decoder)
    if (technique, decoder) in _REFUSED:
        with pytest.raises(Unsuitable, match=_REFUSED[technique, decoder]):
            member.apply(module, _context())
        return
    whole = copy.deepcopy(module)
    member.apply(module, _context())
    gone = round(0.35 * _INNER_WIDTH.get(decoder, 40)) if technique == "prune-ffn" else 2 * 8
    assert _with_zeros(whole, module) == 4 * gone
    _same(_logits(module), _logits(whole))
    _same(_cached_logits(module), _logits(whole))
    _generates_and_is_built_again(member, technique, decoder, module, tmp_path)


@pytest.mark.parametrize("decoder", _DECODERS)
def test_a_decoder_without_layers_computes_what_the_whole_does_with_these_layers_passed_by(
    decoder: str, tmp_path: Path
) -> None:
    member, module = _technique("drop-layers", share=0.5), _built(decoder)
    blocks = _blocks(module)
    whole = copy.deepcopy(module)
    member.apply(module, _context())
    assert len(_blocks(module)) == 2
    stays = [any(block is left for left in _blocks(module)) for block in blocks]
    for block, stay in zip(_blocks(whole), stays, strict=True):
        if not stay:
            block.register_forward_hook(
                lambda layer, given, output: given[0] if hasattr(output, "shape") else (given[0], *output[1:])
            )
    _same(_logits(module), _logits(whole))
    _same(_cached_logits(module), _logits(module))
    _generates_and_is_built_again(member, "drop-layers", decoder, module, tmp_path)


_BERT = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
_T5 = {"vocab_size": 96, "d_model": 48, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 6, "pad_token_id": 0,
       "decoder_start_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "sizes", "technique", "gone"),
    [
        ("BertForMaskedLM", "BertConfig", _BERT, "prune-ffn", 2 * 14),
        ("BertForMaskedLM", "BertConfig", _BERT, "prune-heads", 2 * 2 * 8),
        ("ModernBertForMaskedLM", "ModernBertConfig", {**_BERT, "pad_token_id": 0}, "prune-ffn", 2 * 14),
        ("T5ForConditionalGeneration", "T5Config", _T5, "prune-ffn", 4 * 14),
    ],
)
def test_encoders_and_encoder_decoders_are_cut_likewise(
    architecture: str, config: str, sizes: dict[str, int], technique: str, gone: int
) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    module = _unlike(getattr(transformers, architecture)(getattr(transformers, config)(**sizes)).eval())
    whole = copy.deepcopy(module)
    _technique(technique, share=0.35).apply(module, _context())
    assert _with_zeros(whole, module) == gone
    decoder = {"decoder_input_ids": _ids()} if module.config.is_encoder_decoder else {}
    with torch.no_grad():
        _same(module(_ids(), **decoder).logits, whole(_ids(), **decoder).logits)


def test_a_decoder_beside_an_encoder_loses_the_layers_that_are_named() -> None:
    import transformers

    module: Any = _unlike(transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)).eval())
    with pytest.raises(Unsuitable, match=r"in 2 lists; name one with layers = …: 'encoder\.block\.\*' \(2 T5Block\), "):
        _technique("drop-layers").apply(module, _context())
    _technique("drop-layers", layers="decoder.block.*").apply(module, _context())
    assert (len(module.encoder.block), len(module.decoder.block)) == (2, 1)
    assert (module.config.num_layers, module.config.num_decoder_layers) == (2, 1)


@pytest.mark.parametrize(("pattern", "may_go"), [("model.layers.[23]", {2, 3}), ("model.layers.[01]", {0, 1})])
def test_layers_dropped_from_part_of_a_list_are_numbered_and_counted_in_the_whole_list(
    pattern: str, may_go: set[int]
) -> None:
    module, (_, options) = _built("llama"), _DECODERS["llama"]
    before, member = _blocks(module), _technique("drop-layers", layers=pattern)
    member.apply(module, _context())
    gone = {place for place, block in enumerate(before) if not any(block is left for left in _blocks(module))}
    assert len(gone) == 1
    assert gone <= may_go
    assert [block.self_attn.layer_idx for block in _blocks(module)] == [0, 1, 2]
    assert module.config.num_hidden_layers == options["num_hidden_layers"] - 1
    _same(_cached_logits(module), _logits(module))
    assert member.remark(module, _context()) is None


@pytest.mark.parametrize("technique", ["prune-ffn", "prune-heads"])
def test_a_configuration_stays_as_it_was_where_some_of_the_layers_that_it_describes_are_cut(technique: str) -> None:
    module = _built("llama")
    stated, member = module.config.to_dict(), _technique(technique, share=0.35, layers="model.layers.[01]")
    member.apply(module, _context())
    assert module.config.to_dict() == stated
    assert "cannot build from its configuration" in str(member.remark(module, _context()))
    _same(_cached_logits(module), _logits(module))


_BART = {"vocab_size": 96, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40,
         "decoder_ffn_dim": 40, "encoder_attention_heads": 6, "decoder_attention_heads": 6, "pad_token_id": 0,
         "decoder_start_token_id": 0}  # fmt: skip


def test_a_configuration_states_an_encoders_width_apart_from_the_decoders() -> None:
    import transformers

    module: Any = transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART)).eval()
    member = _technique("prune-ffn", share=0.35, layers="model.encoder.layers.*")
    member.apply(module, _context())
    assert (module.config.encoder_ffn_dim, module.config.decoder_ffn_dim) == (26, 40)
    assert member.remark(module, _context()) is None
    _technique("prune-heads", share=0.5, layers="model.encoder.layers.*").apply(module, _context())
    assert (module.config.encoder_attention_heads, module.config.decoder_attention_heads) == (3, 6)


def _blocks(module: Any) -> list[Any]:
    from torch import nn

    return list(next(child for child in module.modules() if isinstance(child, nn.ModuleList)))


def _generates_and_is_built_again(member: Technique, technique: str, decoder: str, module: Any, folder: Path) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, plain = (module.generate(_ids(), use_cache=use, **options) for use in (True, False))
    assert (cached == plain).all()
    remark = member.remark(module, _context())
    if decoder in _NOT_IN_A_CONFIGURATION[technique]:
        assert "cannot build from its configuration" in str(remark)
        return
    assert remark is None
    module.save_pretrained(folder)
    _same(_logits(type(module).from_pretrained(folder).eval()), _logits(module))
