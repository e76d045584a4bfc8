"""Adapters against plain references: which parameters there are, what they compute, what alone is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.errors import SuiteError
from membench.plugins import Setting, Unsuitable, Workload, registry
from tests.adapting import MODELS, built_with, context_of, technique_named, trained_in
from tests.adapting import undisturbed as undisturbed  # a fixture of every test here

if TYPE_CHECKING:
    import torch
    from torch import nn

# Inputs and outputs of a block's projections, added up.
_GROUPED = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192)
_INPUTS_AND_OUTPUTS = {
    "llama": _GROUPED,
    "qwen": _GROUPED,
    "gpt2": (64 + 3 * 64) + (64 + 64) + 2 * (64 + 192),
}
_QUANTIZERS = ("bnb-nf4", "nf4", "bnb-int8", "int8-weight-only", "fp8-weight-only", "round-to-nearest")


def _training(**options: Any) -> Workload:
    return cast(Workload, registry.create("workload", "train", options))


def _stir(module: nn.Module) -> None:
    """Make no adapter zero, so that each one shows."""
    import torch

    for parameter in trained_in(module).values():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1)


def _ids(length: int) -> torch.Tensor:
    import torch

    return torch.arange(length)[None] * 7 % 96


@pytest.mark.parametrize("model", _INPUTS_AND_OUTPUTS)
def test_a_projection_has_rank_times_inputs_plus_outputs_trained_parameters_and_nothing_else_is_trained(
    model: str,
) -> None:
    trained = trained_in(built_with(model, technique_named("lora", rank=3)))
    assert sum(parameter.numel() for parameter in trained.values()) == 2 * 3 * _INPUTS_AND_OUTPUTS[model]
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_targets_name_the_layers_that_are_adapted() -> None:
    trained = trained_in(built_with("llama", technique_named("lora", rank=3, targets=["q_proj", "down_proj"])))
    assert sum(parameter.numel() for parameter in trained.values()) == 2 * 3 * (64 + 64 + 192 + 64)


@pytest.mark.parametrize("quantizer", [None, "bf16", *_QUANTIZERS])
def test_at_the_start_adapters_change_no_logit(quantizer: str | None) -> None:
    import torch

    before = () if quantizer is None else (technique_named(quantizer),)
    with torch.no_grad():
        plain = built_with("llama, no groups", *before)(_ids(16)).logits
        adapted = built_with("llama, no groups", *before, technique_named("lora"))(_ids(16)).logits
    assert torch.equal(adapted, plain)


@pytest.mark.parametrize("model", ["gpt2", "qwen"])
def test_at_the_start_they_change_none_of_other_families_either(model: str) -> None:
    import torch

    with torch.no_grad():
        assert torch.equal(
            built_with(model, technique_named("lora"))(_ids(16)).logits, built_with(model)(_ids(16)).logits
        )


def test_qlora_is_bnb_nf4_and_lora() -> None:
    import torch

    together = built_with("llama, no groups", technique_named("qlora", rank=3, block_size=32))
    stacked = built_with("llama, no groups", technique_named("bnb-nf4", block_size=32), technique_named("lora", rank=3))
    theirs = dict(stacked.named_parameters())
    ours = dict(together.named_parameters())
    assert ours.keys() == theirs.keys()
    kinds = {name: (type(parameter), parameter.shape, parameter.dtype) for name, parameter in ours.items()}
    assert kinds == {name: (type(parameter), parameter.shape, parameter.dtype) for name, parameter in theirs.items()}
    with torch.no_grad():
        assert torch.equal(together(_ids(16)).logits, stacked(_ids(16)).logits)


@pytest.mark.parametrize("quantizer", [None, *_QUANTIZERS])
def test_an_adapted_layer_and_its_gradients_are_those_of_the_formula_written_out(quantizer: str | None) -> None:
    import torch

    before = () if quantizer is None else (technique_named(quantizer),)
    module = built_with("llama, no groups", *before, technique_named("lora", rank=3, alpha=12.0)).train()
    _stir(module)
    layer = module.model.layers[1].mlp.down_proj
    lower, upper = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        weight = layer.base_layer(torch.eye(192)).T.clone()
    inputs, wanted = torch.randn(5, 192, requires_grad=True), torch.randn(5, 64)

    expected = inputs @ weight.T + 12.0 / 3 * inputs @ lower.T @ upper.T
    output = layer(inputs)
    # bnb-int8 rounds inputs and products; the others compute as plain layers do
    close = 2e-2 if quantizer == "bnb-int8" else 1e-4
    torch.testing.assert_close(output, expected, rtol=close, atol=close)
    leaves = (inputs, lower, upper)
    ours = torch.autograd.grad((output * wanted).sum(), leaves)
    theirs = torch.autograd.grad((expected * wanted).sum(), leaves)
    for own, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, reference, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("model", "technique", "options"),
    [
        ("llama", "lora", {}),
        ("qwen", "lora", {}),
        ("gpt2", "lora", {}),
        ("llama", "lora", {"targets": ["embed_tokens"]}),
        ("gpt2", "lora", {"targets": ["wte", "c_attn"]}),
        ("llama, no groups", "qlora", {}),
    ],
)
def test_training_moves_adapters_and_leaves_every_frozen_weight_as_it_is(
    model: str, technique: str, options: dict[str, Any]
) -> None:
    import torch

    adapters = technique_named(technique, **options)
    module = built_with(model, adapters).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    context = context_of(model)
    step = _training(learning_rate=1e-2).start(module, lambda count: _ids(count)[0], [adapters], context)
    first = step()
    for _ in range(3):
        last = step()
    assert first is not None
    assert last is not None
    assert last < first
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trained_in(module))
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == moved


def test_adapters_keep_a_little_less_for_the_backward_pass_and_more_with_dropout() -> None:
    full = _kept_for_backward(built_with("llama").train())
    adapted, dropping = (
        _kept_for_backward(built_with("llama", technique_named("lora", rank=1, dropout=dropout)).train())
        for dropout in (0, 0.1)
    )
    row = 4 * 64 * 64  # 64 tokens of 64 numbers in fp32
    # What five norms multiply by their weights, and what the output head does.
    assert full - adapted == pytest.approx(6 * row, abs=1.5 * row)
    # In each of two layers the inputs of seven projections, 6 · 64 + 192 numbers a token, and their masks; what
    # projections shared before is gone.
    assert 2 * 9 * row < dropping - adapted < 2 * 2 * 9 * row


def _kept_for_backward(module: nn.Module) -> int:
    """Bytes that autograd keeps of a pass over 64 tokens, beside the parameters."""
    import torch

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(_ids(64))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    del output
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


def test_adapters_are_in_fp32_over_half_precision() -> None:
    import torch

    module = built_with("llama", technique_named("bf16"), technique_named("lora"))
    assert {parameter.dtype for parameter in trained_in(module).values()} == {torch.float32}
    assert module(_ids(4)).logits.dtype == torch.bfloat16


def test_dropout_is_on_in_training_alone() -> None:
    import torch

    module = built_with("llama", technique_named("lora", dropout=0.5))
    _stir(module)
    with torch.no_grad():
        assert torch.equal(module(_ids(8)).logits, module(_ids(8)).logits)
        module.train()
        assert not torch.equal(module(_ids(8)).logits, module(_ids(8)).logits)


@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_tokens_decoded_with_a_cache_have_the_logits_of_a_whole_pass(technique: str) -> None:
    import torch

    module = built_with("llama, no groups", technique_named(technique))
    _stir(module)
    with torch.no_grad():
        module(_ids(12))  # bitsandbytes packs its weights anew in the first pass
        whole = module(_ids(12)).logits
        prefill = module(_ids(12)[:, :11], use_cache=True)
        decoded = module(_ids(12)[:, 11:], past_key_values=prefill.past_key_values, use_cache=True).logits
    # On CPUs with AVX512-BF16 bitsandbytes computes in bf16.
    close = 1e-5 if technique == "lora" else 2e-2
    torch.testing.assert_close(decoded[:, 0], whole[:, 11], rtol=close, atol=close)


def test_it_is_still_the_model_that_its_family_knows() -> None:
    plain, adapted = built_with("llama"), built_with("llama", technique_named("lora"))
    assert type(adapted) is type(plain)
    assert adapted.get_output_embeddings() is adapted.lm_head
    assert adapted.config.to_dict() == plain.config.to_dict()


def test_weights_that_no_gradient_passes_through_are_refused_when_training_starts() -> None:
    stack = (technique_named("int8-dynamic"), technique_named("lora"))
    module = built_with("llama, no groups", *stack).train()
    with pytest.raises(Unsuitable, match="no gradient passes through a Linear with a Int8Tensor as its weight"):
        _training().start(module, lambda count: _ids(count)[0], stack, context_of("llama, no groups"))


@pytest.mark.parametrize("base", [None, "int8-weight-only"])
def test_layers_that_begin_as_zeros_are_no_reason_to_refuse_adapters(base: str | None) -> None:
    """The gradient through a weight of zeros is zero, whatever passes gradients and whatever does not."""
    from membench.builtin.techniques.adapters import _adapted_layers, _passes_gradients

    technique = technique_named("lora", targets=["down_proj"])
    zeros = built_with("llama, no groups")
    for layer in zeros.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    for member in (*(() if base is None else (technique_named(base),)), technique):
        zeros = member.apply(zeros, context_of("llama, no groups"))
    assert {_passes_gradients(layer) for _, layer in _adapted_layers(zeros)} == {None}
    _training().start(zeros.train(), lambda count: _ids(count)[0], [technique], context_of("llama, no groups"))
    filled = built_with("llama, no groups", *(() if base is None else (technique_named(base),)), technique)
    assert {_passes_gradients(layer) for _, layer in _adapted_layers(filled)} == {True}


def test_a_rehearsal_adapts_a_miniature_whose_layers_have_other_names() -> None:
    import dataclasses

    technique = technique_named("lora", targets=["fc_1"])
    context = dataclasses.replace(context_of("llama"), rehearsal=True)
    assert trained_in(technique.apply(MODELS["llama"].build(context), context))


def test_qlora_is_rehearsed_in_blocks_that_fit_a_miniature() -> None:
    import dataclasses

    technique = cast(Any, technique_named("qlora", block_size=1024))
    context = dataclasses.replace(context_of("llama, no groups"), rehearsal=True)
    module = technique.apply(MODELS["llama, no groups"].build(context), context)
    assert technique.remark(module, context) is None


def test_adapters_upon_adapters_are_refused() -> None:
    setting = Setting(MODELS["llama"], _training(), "cpu", (technique_named("lora"),), ())
    for name in ("lora", "qlora"):
        assert technique_named(name).refuse(setting) == "there are adapters already"


def test_qlora_upon_quantized_weights_is_refused() -> None:
    setting = Setting(MODELS["llama"], _training(), "cpu", (technique_named("int8-weight-only"),), ())
    assert technique_named("qlora").refuse(setting) == "the weights are quantized already"
    assert technique_named("qlora").refuse(Setting(MODELS["llama"], _training(), "cpu", (), ())) is None


@pytest.mark.parametrize(
    ("use", "option", "message"),
    [
        ("lora", "rank = 0", "must be at least 1"),
        ("lora", "rank = 289", "rank = 289 is more than the model's width 288: no low rank"),
        ("lora", "alpha = 0", "must be more than 0"),
        ("lora", "dropout = 1.0", "less than 1"),
        ("lora", "targets = []", "must have at least 1 entry"),
        ("qlora", "block_size = 48", "32, 64"),
        ("qlora", "block_size = 64", "does not divide the width 288"),
    ],
)
def test_options_that_fit_nothing_refuse_the_suite(use: str, option: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["a"]\nworkload = ["train"]\n'
        f'[technique.a]\nuse = "{use}"\n{option}\n'
    )
    with pytest.raises(SuiteError, match=message):
        membench.load_suite(path)
