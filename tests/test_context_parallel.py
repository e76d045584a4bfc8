"""Context parallelism: tokens of a sequence on several ranks, and the losses, gradients and logits of a single one."""

from __future__ import annotations

import re
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from membench.builtin.models import architectures
from membench.builtin.techniques.parallel.context_parallel import ContextParallel
from membench.builtin.workloads.train import next_token_loss, token_loss
from membench.cli import main
from membench.plugins import Setting, TrainingStep, Unsuitable, registry
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from tests.on_ranks import on_ranks

_WIDTH, _LAYERS, _HEADS, _KEY_VALUE_HEADS, _VOCABULARY = 128, 4, 4, 2, 1024
_ROWS, _TOKENS = 2, 128
_SUITE = f"""
[suite]
name = "context-parallel"
[settings]
warmup_steps = 1
measured_steps = 1
evaluate_s = 0.1
[matrix]
model = ["small"]
technique = ["none", "context-parallel"]
workload = ["train"]
device = ["2xcpu"]
[[include]]
model = "small"
technique = "context-parallel"
workload = "forward"
device = "2xcpu"
[[include]]
model = "small"
technique = "ddp+context-parallel"
workload = "train"
device = "4xcpu"
[[exclude]]
technique = ["ddp"]
[model.small]
use = "config"
source = "llama"
[model.small.overrides]
hidden_size = {_WIDTH}
intermediate_size = 352
num_hidden_layers = {_LAYERS}
num_attention_heads = {_HEADS}
num_key_value_heads = {_KEY_VALUE_HEADS}
vocab_size = {_VOCABULARY}
tie_word_embeddings = false
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("context-parallel")
    (folder / "suite.toml").write_text(_SUITE)
    assert main(["run", str(folder / "suite.toml"), "--output", str(folder / "results")]) == 0
    return {record.id: record for record in read_run(newest_run(folder / "results")).records}


def _mean_losses(record: Record) -> list[float]:
    by_rank = [[loss or 0 for loss in process.losses_nats or ()] for process in record.processes]
    return [sum(losses) / len(losses) for losses in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("case", ["context-parallel/train/2xcpu", "ddp+context-parallel/train/4xcpu"])
def test_the_mean_of_the_ranks_losses_is_that_of_a_single_device_batch_for_batch(
    case: str, records: dict[str, Record]
) -> None:
    single, parts = _mean_losses(records["small/none/train/cpu"]), _mean_losses(records[f"small/{case}"])
    assert len(single) > 2
    assert parts == pytest.approx(single, abs=1e-4)


def test_weights_and_states_are_whole_and_activations_half(records: dict[str, Record]) -> None:
    single, parts = (records[f"small/{case}"].metrics for case in ("none/train/cpu", "context-parallel/train/2xcpu"))
    for name in ("weights_bytes", "trained_weights_bytes", "optimizer_state_bytes"):
        assert parts[name] == single[name]
    assert (parts["activations_bytes"] or 0) / (single["activations_bytes"] or 1) == pytest.approx(0.5, abs=0.05)
    assert (parts["peak_live_bytes"] or 0) < (single["peak_live_bytes"] or 0)


def test_a_step_exchanges_queries_keys_values_and_what_was_attended_and_reduces_gradients(
    records: dict[str, Record],
) -> None:
    heads, size, tokens = 2 * _HEADS + 2 * _KEY_VALUE_HEADS, _WIDTH // _HEADS, _ROWS * _TOKENS // 2
    forward = _LAYERS * heads * size * tokens * 4
    record = records["small/context-parallel/train/2xcpu"]
    for process in record.processes:
        expected = {"all_to_all": 2 * forward, "all_reduce": record.metrics["trained_weights_bytes"]}
        assert process.communicated_bytes == expected


def test_prefill_keeps_a_ranks_own_logits_and_held_out_text_is_judged_by_those_of_all(
    records: dict[str, Record],
) -> None:
    record = records["small/context-parallel/forward/2xcpu"]
    assert all(set(process.communicated_bytes or ()) == {"all_to_all"} for process in record.processes)
    assert record.metrics["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert record.metrics["top1_agreement_percent"] == 100


_FAMILIES = ("llama", "gpt2")
_IDS = torch.arange(2 * 16).view(2, 16) * 7 % 96


def _model(family: str, **more: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    config = architectures.config_of_type(family, {**sizes, **dropout, **more})
    torch.manual_seed(0)
    return architectures.made(architectures.default_class(config), config)


def _gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _shared_among_ranks() -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("sequence",)), {}
    context: Any = SimpleNamespace(ranks=SimpleNamespace(mesh=mesh, degree=lambda dimension: 1))
    for family in _FAMILIES:
        technique = ContextParallel.model_validate({})
        module = technique.parallelize(_model(family), context)
        with torch.no_grad():
            logits = module(_IDS[:, :13]).logits
        plain = TrainingStep(lambda batch: [batch], token_loss, torch.autograd.backward, lambda: None, lambda: None)
        step = technique.training_step(plain, context)
        step.backward(step.loss(module, _IDS))
        step.step()
        found[family] = {"logits": logits, "gradients": _gradients(module)}
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_shared_among_ranks, tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_rank_ends_with_the_gradients_of_the_whole_sequence(family: str, shared: list[dict[str, Any]]) -> None:
    module = _model(family)
    torch.autograd.backward(next_token_loss(module, _IDS))
    for rank in shared:
        for name, gradient in _gradients(module).items():
            torch.testing.assert_close(rank[family]["gradients"][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_sequence_that_ranks_cannot_share_evenly_has_the_logits_of_a_single_device(
    family: str, shared: list[dict[str, Any]]
) -> None:
    with torch.no_grad():
        expected = _model(family)(_IDS[:, :13]).logits
    for rank in shared:
        torch.testing.assert_close(rank[family]["logits"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("bert", {}, "BertForMaskedLM is no decoder alone: its tokens also see those after them"),
        ("mamba", {}, "the attention of MambaForCausalLM does not go through transformers' registry"),
        ("gemma3_text", {}, "Gemma3ForCausalLM has layers of other kinds than full attention: sliding_attention"),
        ("llama", {"num_key_value_heads": 1}, "1 key-value heads cannot be shared among 2 ranks"),
    ],
)
def test_a_model_whose_tokens_meet_elsewhere_is_refused(family: str, more: dict[str, Any], reason: str) -> None:
    mesh = SimpleNamespace(device_type="cpu", size=lambda: 2)
    context: Any = SimpleNamespace(ranks=SimpleNamespace(mesh={"sequence": mesh}, degree=lambda dimension: 1))
    with pytest.raises(Unsuitable, match=re.escape(reason)):
        ContextParallel.model_validate({}).parallelize(_model(family, **more), context)


def test_another_loss_in_the_stack_is_refused() -> None:
    technique = ContextParallel.model_validate({})
    module = nn.Linear(1, 1)
    technique._parts, technique._module = SimpleNamespace(), weakref.ref(module)  # type: ignore[assignment]
    other: Any = SimpleNamespace(loss=lambda module, rows: None)
    with pytest.raises(Unsuitable, match="the stack names another loss"):
        technique.training_step(other, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workload", "options", "model", "ranks", "device", "reason"),
    [
        ("generate", {}, "llama-60m", 2, "cpu", "generating takes one at a time"),
        ("train", {"sequence_length": 129}, "llama-60m", 2, "cpu", "129 tokens cannot be shared among 2 ranks"),
        ("train", {"sequence_length": 130}, "llama-60m", 2, "cuda", "130 tokens cannot be shared among 2 ranks"),
        ("train", {}, "llama-15m", 4, "cpu", "6 heads cannot be shared among 4 ranks"),
        ("train", {}, "llama-15m", 4, "cuda", None),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_runs(
    workload: str, options: dict[str, Any], model: str, ranks: int, device: str, reason: str | None
) -> None:
    made = registry.create("workload", workload, options)
    setting = Setting(registry.create("model", model, {}), made, device, (), (), ranks)
    refused = ContextParallel.model_validate({}).refuse(setting)
    assert refused is None if reason is None else reason in (refused or "")
