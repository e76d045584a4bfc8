"""Adapters against plain references: which parameters there are, what they compute, what alone is trained and held."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

import membench
from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.errors import SuiteError
from membench.plugins import Context, Model, NotInModel, Setting, Shape, Technique, Unsuitable, Workload, registry
from membench.records.record import Record

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHAPE = Shape(width=64, layers=2, heads=4, key_value_heads=2, inner_width=192, vocabulary=96, longest=160, tied=True)
_EVEN = _SHAPE._replace(key_value_heads=4)
_MODELS: dict[str, Model] = {
    "llama": Llama.of_shape(_SHAPE),
    "qwen": Qwen.of_shape(_SHAPE),
    "gpt2": Gpt2.of_shape(_EVEN),
    "llama, no groups": Llama.of_shape(_EVEN),
}
# Inputs and outputs of a block's projections, added up.
_GROUPED = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 192)
_INPUTS_AND_OUTPUTS = {
    "llama": _GROUPED,
    "qwen": _GROUPED,
    "gpt2": (64 + 3 * 64) + (64 + 64) + 2 * (64 + 192),
}
_QUANTIZERS = ("bnb-nf4", "nf4", "bnb-int8", "int8-weight-only", "fp8-weight-only", "round-to-nearest")


@pytest.fixture(scope="module", autouse=True)
def _undisturbed() -> Iterator[None]:
    """On one thread; what libraries warn of while they are imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import torchao.quantization  # noqa: F401
        import transformers.models.auto.modeling_auto
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _context(model: str) -> Context:
    return Context("cpu", 0, _MODELS[model], lambda name: contextlib.nullcontext(), {}, Path())


def _technique(name: str, **options: Any) -> Technique:
    return cast(Technique, registry.create("technique", name, options))


def _training(**options: Any) -> Workload:
    return cast(Workload, registry.create("workload", "train", options))


def _built(model: str, *techniques: Technique) -> Any:
    """A model that does not drop out, with techniques applied in order."""
    module = _MODELS[model].build(_context(model))
    for technique in techniques:
        module = technique.apply(module, _context(model))
    return module.eval()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _stir(module: nn.Module) -> None:
    """Make no adapter zero, so that each one shows."""
    import torch

    for parameter in _trained(module).values():
        parameter.data.copy_(torch.randn_like(parameter) * 0.1)


def _ids(length: int) -> torch.Tensor:
    import torch

    return torch.arange(length)[None] * 7 % 96


@pytest.mark.parametrize("model", _INPUTS_AND_OUTPUTS)
def test_a_projection_has_rank_times_inputs_plus_outputs_trained_parameters_and_nothing_else_is_trained(
    model: str,
) -> None:
    trained = _trained(_built(model, _technique("lora", rank=3)))
    assert sum(parameter.numel() for parameter in trained.values()) == 2 * 3 * _INPUTS_AND_OUTPUTS[model]
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_targets_name_the_layers_that_are_adapted() -> None:
    trained = _trained(_built("llama", _technique("lora", rank=3, targets=["q_proj", "down_proj"])))
    assert sum(parameter.numel() for parameter in trained.values()) == 2 * 3 * (64 + 64 + 192 + 64)


@pytest.mark.parametrize("quantizer", [None, "bf16", *_QUANTIZERS])
def test_at_the_start_adapters_change_no_logit(quantizer: str | None) -> None:
    import torch

    before = () if quantizer is None else (_technique(quantizer),)
    with torch.no_grad():
        plain = _built("llama, no groups", *before)(_ids(16)).logits
        adapted = _built("llama, no groups", *before, _technique("lora"))(_ids(16)).logits
    assert torch.equal(adapted, plain)


@pytest.mark.parametrize("model", ["gpt2", "qwen"])
def test_at_the_start_they_change_none_of_other_families_either(model: str) -> None:
    import torch

    with torch.no_grad():
        assert torch.equal(_built(model, _technique("lora"))(_ids(16)).logits, _built(model)(_ids(16)).logits)


def test_qlora_is_bnb_nf4_and_lora() -> None:
    import torch

    together = _built("llama, no groups", _technique("qlora", rank=3, block_size=32))
    stacked = _built("llama, no groups", _technique("bnb-nf4", block_size=32), _technique("lora", rank=3))
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

    before = () if quantizer is None else (_technique(quantizer),)
    module = _built("llama, no groups", *before, _technique("lora", rank=3, alpha=12.0)).train()
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

    adapters = _technique(technique, **options)
    module = _built(model, adapters).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    context = _context(model)
    step = _training(learning_rate=1e-2).start(module, lambda count: _ids(count)[0], [adapters], context)
    first = step()
    for _ in range(3):
        last = step()
    assert first is not None
    assert last is not None
    assert last < first
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(_trained(module))
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == moved


def test_adapters_keep_a_little_less_for_the_backward_pass_and_more_with_dropout() -> None:
    full = _kept_for_backward(_built("llama").train())
    adapted, dropping = (
        _kept_for_backward(_built("llama", _technique("lora", rank=1, dropout=dropout)).train()) for dropout in (0, 0.1)
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

    module = _built("llama", _technique("bf16"), _technique("lora"))
    assert {parameter.dtype for parameter in _trained(module).values()} == {torch.float32}
    assert module(_ids(4)).logits.dtype == torch.bfloat16


def test_dropout_is_on_in_training_alone() -> None:
    import torch

    module = _built("llama", _technique("lora", dropout=0.5))
    _stir(module)
    with torch.no_grad():
        assert torch.equal(module(_ids(8)).logits, module(_ids(8)).logits)
        module.train()
        assert not torch.equal(module(_ids(8)).logits, module(_ids(8)).logits)


@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_tokens_decoded_with_a_cache_have_the_logits_of_a_whole_pass(technique: str) -> None:
    import torch

    module = _built("llama, no groups", _technique(technique))
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
    plain, adapted = _built("llama"), _built("llama", _technique("lora"))
    assert type(adapted) is type(plain)
    assert adapted.get_output_embeddings() is adapted.lm_head
    assert adapted.config.to_dict() == plain.config.to_dict()


def test_weights_that_no_gradient_passes_through_are_refused_when_training_starts() -> None:
    stack = (_technique("int8-dynamic"), _technique("lora"))
    module = _built("llama, no groups", *stack).train()
    with pytest.raises(Unsuitable, match="no gradient passes through a Linear with a Int8Tensor as its weight"):
        _training().start(module, lambda count: _ids(count)[0], stack, _context("llama, no groups"))


@pytest.mark.parametrize("base", [None, "int8-weight-only"])
def test_layers_that_begin_as_zeros_are_no_reason_to_refuse_adapters(base: str | None) -> None:
    """The gradient through a weight of zeros is zero, whatever passes gradients and whatever does not."""
    from membench.builtin.techniques.adapters import _adapted_layers, _passes_gradients

    technique = _technique("lora", targets=["down_proj"])
    zeros = _built("llama, no groups")
    for layer in zeros.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    for member in (*(() if base is None else (_technique(base),)), technique):
        zeros = member.apply(zeros, _context("llama, no groups"))
    assert {_passes_gradients(layer) for _, layer in _adapted_layers(zeros)} == {None}
    _training().start(zeros.train(), lambda count: _ids(count)[0], [technique], _context("llama, no groups"))
    filled = _built("llama, no groups", *(() if base is None else (_technique(base),)), technique)
    assert {_passes_gradients(layer) for _, layer in _adapted_layers(filled)} == {True}


def test_targets_that_no_layer_has_are_named_with_what_there_is() -> None:
    with pytest.raises(NotInModel) as caught:
        _built("gpt2", _technique("lora", targets=["q_proj", "v_proj"]))
    assert str(caught.value) == (
        "no layer has a name of targets = [q_proj, v_proj]; there are wte, wpe, ln_1, c_attn, c_proj, ln_2, c_fc, ln_f,"
        " lm_head"
    )


def test_standard_names_at_the_top_of_a_model_are_no_targets_by_default_and_are_named() -> None:
    from torch import nn

    def two() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

    with pytest.raises(Unsuitable) as caught:
        _technique("lora").apply(two(), _context("llama"))
    assert str(caught.value) == (
        "no layer is adapted: fc1, fc2 (at the top of the model; name it in targets to adapt it)"
    )
    assert len(_trained(_technique("lora", targets=["fc1", "fc2"]).apply(two(), _context("llama")))) == 4


@pytest.mark.parametrize("technique", ["lora", "qlora"])
def test_convolutions_of_projections_names_are_left_alone_and_named(technique: str) -> None:
    from torch import nn

    def block(value: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Conv1d(64, 64, 1, groups=4), "value": value})})

    context = _context("llama")
    adapters = _technique(technique, targets=["query", "value"])
    module = adapters.apply(block(nn.Linear(64, 64)), context)
    assert [(left.path, left.reason) for left in context.left_alone] == [
        ("attention.query", "it is a Conv1d, no linear layer")
    ]
    assert len(_trained(module)) == 2
    assert adapters.remark(module, context) is None
    cast(Any, adapters).optimizer(None, module, context)  # looks for gradients through what is adapted
    with pytest.raises(Unsuitable) as caught:
        adapters.apply(block(nn.Conv1d(64, 64, 1)), _context("llama"))
    assert str(caught.value) == (
        "no layer is adapted: attention.query (it is a Conv1d, no linear layer),"
        " attention.value (it is a Conv1d, no linear layer)"
    )


def test_a_rehearsal_adapts_a_miniature_whose_layers_have_other_names() -> None:
    import dataclasses

    technique = _technique("lora", targets=["fc_1"])
    context = dataclasses.replace(_context("llama"), rehearsal=True)
    assert _trained(technique.apply(_MODELS["llama"].build(context), context))


def test_a_target_that_no_layer_has_is_remarked() -> None:
    technique = _technique("lora", targets=["q_proj", "qproj"])
    module = _built("llama", technique)
    assert technique.remark(module, _context("llama")) == "no layer is named qproj: there are no adapters for it"
    for technique in (_technique("lora"), _technique("lora", targets=["q_proj"])):
        module = _built("llama", technique)
        assert technique.remark(module, _context("llama")) is None


def test_qlora_is_rehearsed_in_blocks_that_fit_a_miniature() -> None:
    import dataclasses

    technique = cast(Any, _technique("qlora", block_size=1024))
    context = dataclasses.replace(_context("llama, no groups"), rehearsal=True)
    module = technique.apply(_MODELS["llama, no groups"].build(context), context)
    assert technique.remark(module, context) is None


def test_adapters_upon_adapters_are_refused() -> None:
    setting = Setting(_MODELS["llama"], _training(), "cpu", (_technique("lora"),), ())
    for name in ("lora", "qlora"):
        assert _technique(name).refuse(setting) == "there are adapters already"


def test_qlora_upon_quantized_weights_is_refused() -> None:
    setting = Setting(_MODELS["llama"], _training(), "cpu", (_technique("int8-weight-only"),), ())
    assert _technique("qlora").refuse(setting) == "the weights are quantized already"
    assert _technique("qlora").refuse(Setting(_MODELS["llama"], _training(), "cpu", (), ())) is None


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


_PROJECTIONS = 6 * (4 * 288 * 288 + 3 * 288 * 768)
_OTHERS = 15_191_712 - _PROJECTIONS
_ROTARY_BYTES = 2 * 4 * 24  # frequencies, for each two of a head's 48 numbers, and as they were at first
_ADAPTERS = 6 * 8 * (4 * (288 + 288) + 3 * (288 + 768))


def test_projections_of_other_names_have_adapters_and_output_heads_have_none() -> None:
    from torch import nn

    from membench.testing.tiny import tiny_module

    model = nn.ModuleDict({"body": tiny_module(), "mlp": nn.ModuleDict({"linear1": nn.Linear(8, 8)})})
    model["output"] = nn.Linear(64, 256)  # a name of attention's projections, but at the top
    adapted = _technique("lora").apply(model, _context("llama"))
    found = {name.partition(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    parts = {f"body.blocks.{n}.attention.{name}" for n in (0, 1) for name in ("query_key_value", "output")}
    assert found == {*parts, "mlp.linear1"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("adapters")
    path = folder / "adapters.toml"
    path.write_text(
        '[suite]\nname = "adapters"\n[matrix]\nmodel = ["llama-15m"]\nworkload = ["train"]\n'
        'technique = ["none", "lora", "qlora-32"]\n'
        "[settings]\nmeasured_steps = 1\n[technique.qlora-32]\nuse = 'qlora'\nblock_size = 32\n"
    )
    return {r.technique: r for r in membench.run(membench.load_suite(path), output=folder).records}


def test_trained_and_frozen_bytes_stand_apart(records: dict[str, Record]) -> None:
    metrics = records["lora"].metrics
    assert metrics["trained_weights_bytes"] == 4 * _ADAPTERS
    assert metrics["frozen_weights_bytes"] == 4 * (_PROJECTIONS + _OTHERS) + _ROTARY_BYTES
    packed = records["qlora-32"].metrics
    assert packed["trained_weights_bytes"] == 4 * _ADAPTERS
    assert packed["frozen_weights_bytes"] == (packed["weights_bytes"] or 0) - 4 * _ADAPTERS


def test_the_base_of_qlora_has_four_bits_a_weight_and_a_byte_a_block_of_32(records: dict[str, Record]) -> None:
    # A block of 32 has its largest in 8 bits, and 256 of these share an fp32 scale; a layer has tables of its own.
    base = _PROJECTIONS * (4 + 8 / 32 + 32 / (32 * 256)) / 8 + 6 * 7 * 4 * (16 + 256)
    measured = (records["qlora-32"].metrics["weights_bytes"] or 0) - 4 * _ADAPTERS - 4 * _OTHERS
    assert measured == pytest.approx(base, rel=0.005)


@pytest.mark.parametrize("technique", ["lora", "qlora-32"])
def test_training_holds_weights_and_gradients_and_states_of_adapters_alone(
    technique: str, records: dict[str, Record]
) -> None:
    metrics = records[technique].metrics
    assert metrics["optimizer_state_bytes"] == pytest.approx(8 * _ADAPTERS, rel=0.01)
    held = (metrics["weights_bytes"] or 0) + (4 + 8) * _ADAPTERS
    # Libraries keep some MiB of their own, now more and now less.
    assert metrics["held_live_bytes"] == pytest.approx(held, rel=0.1)


def test_the_peak_of_training_falls_by_the_states_of_what_is_frozen(records: dict[str, Record]) -> None:
    # The peak is where the backward pass begins: all logits are there, and no gradient yet.
    full, adapted = (records[name].metrics["peak_live_bytes"] or 0 for name in ("none", "lora"))
    assert full - adapted == pytest.approx(8 * (_PROJECTIONS + _OTHERS - _ADAPTERS), rel=0.1)
