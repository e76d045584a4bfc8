"""Tensor parallelism: a rank's share of a model by arithmetic, and the same losses, gradients, logits and tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from membench.builtin.models import architectures
from membench.builtin.techniques.parallel import sequence_parallel, tensor_plan
from membench.builtin.techniques.parallel.local_shards import make_shards_plain
from membench.builtin.techniques.parallel.tensor_parallel import TensorParallel
from membench.cli import main
from membench.plugins import Setting, Unsuitable, registry
from membench.records.record import Record
from membench.records.run_file import newest_run, read_run
from tests.on_ranks import on_ranks

_WIDTH, _INNER, _LAYERS, _HEADS, _KEY_VALUE_HEADS, _VOCABULARY = 128, 352, 4, 4, 2, 1024
_PROJECTIONS = _LAYERS * (2 * _WIDTH * _WIDTH + 2 * _WIDTH * _WIDTH * _KEY_VALUE_HEADS // _HEADS + 3 * _WIDTH * _INNER)
_SPLIT = _PROJECTIONS + 2 * _VOCABULARY * _WIDTH
_WHOLE = (2 * _LAYERS + 1) * _WIDTH
_PROMPT, _NEW = 64, 8
_SUITE = f"""
[suite]
name = "tensor-parallel"
[settings]
warmup_steps = 1
measured_steps = 1
evaluate_s = 0.1
[matrix]
model = ["small"]
technique = ["none", "tensor-parallel"]
workload = ["train", "short"]
device = ["2xcpu"]
[[include]]
model = "small"
technique = "by-tokens"
workload = "train"
device = "2xcpu"
[[include]]
model = "small"
technique = "checkpointing+tensor-parallel"
workload = "train"
device = "2xcpu"
[[include]]
model = "small"
technique = "of-nothing"
workload = "train"
device = "2xcpu"
[[include]]
model = "small"
technique = "fsdp+tensor-parallel"
workload = "train"
device = "4xcpu"
[[include]]
model = "small"
technique = "ddp+tensor-parallel"
workload = "train"
device = "4xcpu"
[[exclude]]
technique = ["checkpointing", "ddp", "fsdp"]
[technique.by-tokens]
use = "tensor-parallel"
sequence_parallel = true
[technique.of-nothing]
use = "tensor-parallel"
plan = {{"encoder.*.dense" = "colwise"}}
[model.small]
use = "config"
source = "llama"
[model.small.overrides]
hidden_size = {_WIDTH}
intermediate_size = {_INNER}
num_hidden_layers = {_LAYERS}
num_attention_heads = {_HEADS}
num_key_value_heads = {_KEY_VALUE_HEADS}
vocab_size = {_VOCABULARY}
tie_word_embeddings = false
[workload.short]
use = "generate"
prompt_length = {_PROMPT}
new_tokens = {_NEW}
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    (folder / "suite.toml").write_text(_SUITE)
    assert main(["run", str(folder / "suite.toml"), "--output", str(folder / "results")]) == 0
    return {record.id: record for record in read_run(newest_run(folder / "results")).records}


def _losses(record: Record) -> list[list[float]]:
    return [[loss or 0 for loss in process.losses_nats or ()] for process in record.processes]


def test_a_rank_has_half_of_every_matrix_and_of_its_states_and_the_norms_whole(records: dict[str, Record]) -> None:
    record = records["small/tensor-parallel/train/2xcpu"]
    expected = (_SPLIT / 2 + _WHOLE) * 4
    assert record.metrics["weights_bytes"] == pytest.approx(expected, rel=0.005)
    assert record.metrics["trained_weights_bytes"] == expected
    assert record.metrics["optimizer_state_bytes"] == pytest.approx(2 * expected, rel=0.005)
    whole = records["small/none/train/cpu"].metrics["trained_weights_bytes"]
    assert whole == (_SPLIT + _WHOLE) * 4


@pytest.mark.parametrize("technique", ["tensor-parallel", "by-tokens", "checkpointing+tensor-parallel"])
def test_losses_are_those_of_a_single_device_batch_for_batch(technique: str, records: dict[str, Record]) -> None:
    (single,) = _losses(records["small/none/train/cpu"])
    for losses in _losses(records[f"small/{technique}/train/2xcpu"]):
        assert len(losses) > 2
        assert losses == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize("technique", ["fsdp+tensor-parallel", "ddp+tensor-parallel"])
def test_of_a_mesh_the_mean_of_the_ranks_losses_is_that_of_a_single_device(
    technique: str, records: dict[str, Record]
) -> None:
    (single,) = _losses(records["small/none/train/cpu"])
    by_rank = _losses(records[f"small/{technique}/train/4xcpu"])
    # Neighbours share matrices and have the same rows.
    assert by_rank[0] == pytest.approx(by_rank[1], abs=1e-5)
    assert by_rank[0] != pytest.approx(by_rank[2], abs=1e-3)
    means = [sum(losses) / len(losses) for losses in zip(*by_rank, strict=True)]
    assert len(means) > 2
    assert means == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize(("technique", "share"), [("fsdp+tensor-parallel", 4), ("ddp+tensor-parallel", 2)])
def test_of_a_mesh_a_rank_has_the_share_of_both_dimensions(
    technique: str, share: int, records: dict[str, Record]
) -> None:
    record = records[f"small/{technique}/train/4xcpu"]
    expected = (_SPLIT / share + _WHOLE * 2 / share) * 4
    assert record.metrics["trained_weights_bytes"] == pytest.approx(expected, rel=0.005)
    assert record.metrics["optimizer_state_bytes"] == pytest.approx(2 * expected, rel=0.005)


def test_a_rank_keeps_fewer_activations_and_fewer_still_with_norms_by_tokens(records: dict[str, Record]) -> None:
    single = records["small/none/train/cpu"].metrics["peak_live_bytes"] or 0
    split = records["small/tensor-parallel/train/2xcpu"].metrics["peak_live_bytes"] or 0
    by_tokens = records["small/by-tokens/train/2xcpu"].metrics["peak_live_bytes"] or 0
    assert by_tokens < split < single


def test_every_rank_builds_the_whole_model_before_it_is_split(records: dict[str, Record]) -> None:
    for process in records["small/tensor-parallel/train/2xcpu"].processes:
        load = process.phase("load")
        assert load is not None
        assert (load.live_peak_bytes or 0) >= (_SPLIT + _WHOLE) * 4


def test_checkpointing_keeps_nothing_more_between_steps_than_without_it(records: dict[str, Record]) -> None:
    plain, checkpointing = (
        records[f"small/{technique}/train/2xcpu"].metrics["held_live_bytes"] or 0
        for technique in ("tensor-parallel", "checkpointing+tensor-parallel")
    )
    assert checkpointing == pytest.approx(plain, abs=2**18)


def test_a_rank_caches_the_keys_and_values_of_its_own_heads(records: dict[str, Record]) -> None:
    record = records["small/tensor-parallel/short/2xcpu"]
    tokens, size, of = _PROMPT + _NEW - 1, _WIDTH // _HEADS, 2
    assert record.metrics["cache_bytes"] == 2 * _LAYERS * (_KEY_VALUE_HEADS // of) * size * tokens * 4
    assert records["small/none/short/cpu"].metrics["cache_bytes"] == of * (record.metrics["cache_bytes"] or 0)


def test_logits_are_those_of_a_single_device(records: dict[str, Record]) -> None:
    record = records["small/tensor-parallel/short/2xcpu"]
    assert record.metrics["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert record.metrics["top1_agreement_percent"] == 100


def test_a_plan_that_matches_no_module_is_reported_as_idle_and_leaves_the_weights_whole(
    records: dict[str, Record],
) -> None:
    record = records["small/of-nothing/train/2xcpu"]
    assert record.status == "ok"
    assert "'of-nothing' changed nothing in the model" in " ".join(record.remarks)
    assert record.metrics["trained_weights_bytes"] == (_SPLIT + _WHOLE) * 4
    assert not records["small/tensor-parallel/train/2xcpu"].remarks


_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # Grouped queries and norms of each head; a plan of transformers' own.
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    # Fused projections whose outputs lie by heads, with biases; a plan of transformers' own.
    "gpt_neox": {},
    # Tied weights, biases, and no plan: by the names of its projections.
    "opt": {"ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64, "dropout": 0.0},
    "llama": {"tie_word_embeddings": True},
}


def _model(family: str) -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    inner = {} if family == "opt" else {"intermediate_size": 96}
    config = architectures.config_of_type(family, {**sizes, **inner, **_FAMILIES.get(family, {})})
    torch.manual_seed(0)
    return architectures.made(architectures.default_class(config), config)


def _learned(module: Any) -> dict[str, Any]:
    """Return the loss, the gradients by the names of weights, and tokens that a module chooses one after the other."""
    ids = torch.arange(2 * 16).view(2, 16) * 7 % 96
    logits = module(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.autograd.backward(loss)
    gradients = {name: _whole(parameter.grad) for name, parameter in module.named_parameters()}
    tokens, cache, given = [], None, ids
    with torch.no_grad():
        for _ in range(4):
            output = module(given, past_key_values=cache, use_cache=True)
            cache, given = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(given.flatten().tolist())
    return {"loss": loss.item(), "gradients": gradients, "tokens": tokens}


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _split_families() -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for family in _FAMILIES:
        module = _model(family)
        tensor_plan.apply(module, mesh, tensor_plan.found(module, 2))
        shards = {id(p): p.to_local().numel() for p in module.parameters() if hasattr(p, "to_local")}
        count = sum(shards.get(id(p), p.numel()) for p in module.parameters())
        found[family] = {**_learned(module), "local numbers": count, "parameters": len(list(module.parameters()))}
    module = _model("llama")
    tensor_plan.apply(module, mesh, tensor_plan.found(module, 2))
    make_shards_plain(module)
    state = {name: _whole(weight) for name, weight in module.state_dict().items()}
    kinds = {type(parameter.data).__name__ for parameter in module.parameters()}
    found["plain shards"] = {"state": state, "kinds": kinds, "loss": _learned(module)["loss"]}
    module = _model("llama")
    sequence_parallel.apply(module, mesh)
    found["llama by tokens"] = {"gradients": _learned_without_cache(module)}
    return found


def _learned_without_cache(module: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * 16).view(2, 16) * 7 % 96
    logits = module(ids, use_cache=False).logits
    torch.autograd.backward(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return {name: _whole(parameter.grad) for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = on_ranks(_split_families, tmp_path_factory.mktemp("families"))
    for family in _FAMILIES:
        assert first[family]["tokens"] == second[family]["tokens"]
    return first


@pytest.mark.parametrize("family", _FAMILIES)
def test_a_split_model_has_the_gradients_and_generates_the_tokens_of_the_whole_one(
    family: str, families: dict[str, Any]
) -> None:
    module = _model(family)
    whole, split = _learned(module), families[family]
    assert split["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert split["tokens"] == whole["tokens"]
    assert split["gradients"].keys() == whole["gradients"].keys(), "tied weights stay one"
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(split["gradients"][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    parameters = list(module.named_parameters())
    matrices = sum(
        parameter.numel() for name, parameter in parameters if parameter.ndim == 2 and "position" not in name
    )
    vectors_and_positions = sum(parameter.numel() for _, parameter in parameters) - matrices
    assert matrices / 2 <= split["local numbers"] <= matrices / 2 + vectors_and_positions


def test_shards_as_plain_tensors_compute_and_are_saved_as_the_weights_that_they_are_of(
    families: dict[str, Any],
) -> None:
    module, plain = _model("llama"), families["plain shards"]
    assert plain["kinds"] == {"Tensor"}
    assert plain["loss"] == pytest.approx(_learned(module)["loss"], abs=1e-5)
    state = module.state_dict()
    assert list(plain["state"]) == list(state)
    for name, weight in state.items():
        torch.testing.assert_close(plain["state"][name], weight, atol=0, rtol=0, msg=name)


def test_norms_by_tokens_have_the_gradients_of_all_tokens(families: dict[str, Any]) -> None:
    for name, gradient in _learned_without_cache(_model("llama")).items():
        split = families["llama by tokens"]["gradients"][name]
        torch.testing.assert_close(split, gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "'transformer.h.0.attn.c_attn' is a Conv1D, as GPT-2 has, which torch's parallelize_module cannot"),
        (
            "mixtral",
            "transformers' plan splits 'model.layers.*.mlp.experts.gate_up_proj' by the style 'packed_colwise'",
        ),
    ],
)
def test_what_torch_cannot_split_is_refused_and_not_left_whole(family: str, reason: str) -> None:
    with pytest.raises(Unsuitable, match=re.escape(reason)):
        tensor_plan.found(_model(family), 2)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    module: Any = _model("llama")
    module.model.layers[1].mlp.up_proj = _doubling(module.model.layers[1].mlp.up_proj)
    with pytest.raises(
        Unsuitable, match=r"'model.layers.1.mlp.up_proj' is a Doubling: torch splits plain Linear layers"
    ):
        tensor_plan.apply(module, SimpleNamespace(size=lambda: 2), tensor_plan.found(module, 2))  # type: ignore[arg-type]


def _doubling(layer: nn.Linear) -> nn.Linear:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    return Doubling(layer.in_features, layer.out_features, bias=False)


def _refusal(
    technique: dict[str, Any], model: str = "llama-15m", ranks: int = 4, workload: str = "train"
) -> str | None:
    made: Callable[..., Any] = registry.create
    setting = Setting(made("model", model, {}), made("workload", workload, {}), "cpu", (), (), ranks)
    return TensorParallel.model_validate(technique).refuse(setting)


def test_heads_that_ranks_cannot_share_are_refused_before_anything_runs() -> None:
    assert _refusal({}) == "6 heads cannot be shared among 4 ranks"
    assert _refusal({}, "qwen-0.5b", 7) == "2 key-value heads cannot be shared among 7 ranks"
    assert _refusal({}, ranks=2) is None
    by_tokens = {"sequence_parallel": True}
    expected = "sequence_parallel splits tokens, and generating takes one at a time"
    assert _refusal(by_tokens, ranks=2, workload="generate") == expected


def test_a_style_that_torch_does_not_have_is_refused_with_those_there_are() -> None:
    technique = TensorParallel.model_validate({"plan": {"layers.*": "packed_colwise"}})
    setting: Any = None
    assert (technique.check(setting) or "").startswith("plan: 'layers.*' = 'packed_colwise' is no style; there are col")
