"""Techniques on what training keeps from forward to backward: the same training, and less of it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import membench
from membench import plugins
from membench.builtin.models.transformer import Gpt2, Llama, Qwen
from membench.errors import SuiteError
from membench.plugins import Shape, registry
from membench.records.record import Record
from membench.worker.weights import fingerprint
from tests import shapes
from tests.training import STEPS, context, train

_SHAPE = Shape(64, 4, 4, 2, 128, 300, 64, True)
_MODELS = {
    "llama": Llama.of_shape(_SHAPE),
    "qwen": Qwen.of_shape(_SHAPE._replace(tied=False)),
    "gpt2": Gpt2.of_shape(_SHAPE._replace(key_value_heads=4)),
}
_B, _T = 4, 64


def _technique(name: str, **options: Any) -> Any:
    return registry.create("technique", name, options)


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize(
    "techniques",
    [
        [_technique("checkpointing")],
        [_technique("checkpointing", every_k=2)],
        [_technique("step-in-backward")],
        [_technique("checkpointing"), _technique("step-in-backward")],
        [_technique("offload-activations")],
        [_technique("offload-activations"), _technique("checkpointing")],
    ],
    ids=["checkpointing", "every-2nd", "step-in-backward", "both", "offload", "offload-checkpoints"],
)
def test_neither_computing_again_nor_stepping_early_nor_moving_changes_a_bit(
    model: str, techniques: list[plugins.Technique]
) -> None:
    plain, saving = train(_MODELS[model]), train(_MODELS[model], techniques)
    assert len(plain.losses) == STEPS
    assert saving.losses == plain.losses
    assert saving.largest_difference(plain) == 0.0


def test_offloading_moves_activations_and_leaves_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    moved: list[int] = []

    class Watched(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            assert pin_memory
            super().__init__(pin_memory=True)
            move = self.pack_hook

            def watched(tensor: torch.Tensor) -> Any:
                moved.append(tensor.untyped_storage().data_ptr())
                return move(tensor)

            self.pack_hook = watched

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    module = train(_MODELS["llama"], [_technique("offload-activations")]).module
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert not set(moved) & weights
    # At the least each layer's seven products and two norms have kept their inputs.
    assert len(moved) > STEPS * _SHAPE.layers * 9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stepping_in_the_backward_pass_works_with_each_optimizer(optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1e-2}
    plain = train(_MODELS["llama"], **options)
    early = train(_MODELS["llama"], [_technique("step-in-backward")], **options)
    assert early.largest_difference(plain) == 0.0
    assert all(parameter.grad is None for parameter in early.module.parameters())
    assert all(parameter.grad is not None for parameter in plain.module.parameters())
    assert _elements(early.optimizer_state) == _elements(plain.optimizer_state)


def _elements(optimizer_state: Any) -> int:
    return sum(tensor.numel() for state in optimizer_state.values() for tensor in state.values() if tensor is not None)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("model", ["llama", "qwen"])
def test_micro_batches_add_up_to_the_whole_batch(model: str, k: int) -> None:
    plain, parts = train(_MODELS[model]), train(_MODELS[model], [_technique(f"accumulate-{k}")])
    assert parts.losses == pytest.approx(plain.losses, abs=2e-6)
    assert parts.largest_difference(plain) < 1e-5
    assert plain.largest_difference(train(_MODELS[model], learning_rate=0.505)) > 1e-4  # what 1% of a gradient is


def test_two_splits_multiply() -> None:
    twice = [_technique("accumulate-2")] * 2
    plain, parts = train(_MODELS["llama"]), train(_MODELS["llama"], twice)
    assert parts.largest_difference(plain) < 1e-5
    for batch_size, wrong in ((4, None), (2, "4 micro-batches do not divide the batch size 2")):
        workload = registry.create("workload", "train", {"batch_size": batch_size})
        assert twice[1].check(plugins.Setting(_MODELS["llama"], workload, "cpu", (twice[0],), ())) == wrong


@pytest.mark.parametrize("name", ["sdpa", "eager-attention"])
@pytest.mark.parametrize("model", _MODELS)
def test_both_kinds_of_attention_train_alike(model: str, name: str) -> None:
    attention = _technique(name)
    plain, exchanged = train(_MODELS[model]), train(_MODELS[model], [attention])
    assert exchanged.losses == pytest.approx(plain.losses, abs=2e-6)
    assert exchanged.largest_difference(plain) < 1e-5
    assert exchanged.module.config._attn_implementation == attention.implementation  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "dtype", "scores_bytes"),
    [("gpt2", "float32", 4), ("gpt2", "bfloat16", 2)]
    + [(model, dtype, size) for model in ("llama", "qwen") for dtype, size in (("float32", 4), ("bfloat16", 6))],
)
def test_attention_written_out_keeps_the_softmax_in_fp32_with_its_half_but_gpt2s_in_its_own_type(
    model: str, dtype: str, scores_bytes: int
) -> None:
    import torch

    def kept(name: str) -> int:
        module: Any = _technique(name).apply(_MODELS[model].build(context(_MODELS[model])), context(_MODELS[model]))
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        module.to(getattr(torch, dtype)).eval()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = module(torch.zeros(1, tokens, dtype=torch.long))
        del output
        return sum(storage.nbytes() for storage in storages.values())

    # The fewer tokens, the more of the difference is what the kernel keeps: its output and a logarithm a row.
    tokens = 512
    model_of_length = _MODELS[model].of_shape(_SHAPE._replace(key_value_heads=4, longest=tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_MODELS, model, model_of_length)
        more = kept("eager-attention") - kept("sdpa")
    assert more / (4 * 4 * tokens**2) == pytest.approx(scores_bytes, abs=0.3)


def test_every_second_layer_is_checkpointed() -> None:
    module = train(_MODELS["llama"], [_technique("checkpointing", every_k=2)]).module
    assert [layer.gradient_checkpointing for layer in module.model.layers] == [True, False] * 2  # type: ignore


def test_a_model_without_layers_or_transformers_attention_is_not_served() -> None:
    import torch

    reasons = {
        "checkpointing": "a Sequential has no list of like layers: name them with layers",
        "sdpa": "transformers",
    }
    for technique, reason in reasons.items():
        with pytest.raises(plugins.Unsuitable, match=reason):
            _technique(technique).apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), context(_MODELS["llama"]))


@pytest.mark.parametrize(
    ("technique", "options", "reason"),
    [
        ("checkpointing", "every_k = 0", "must be at least 1"),
        ("checkpointing", "every_k = 7", "every_k = 7 is more than the model's 6 layers"),
        ("accumulate", "k = 1", "must be at least 2"),
        ("accumulate", "k = 3", "3 micro-batches do not divide the batch size 4"),
        ("chunked-cross-entropy", "chunk_tokens = 0", "must be at least 1"),
        ("fused-linear-cross-entropy", "chunk_tokens = -1", "must be at least 1"),
        ("offload-activations", "pin = true", "unknown option 'pin'"),
    ],
)
def test_a_bad_option_refuses_the_suite(technique: str, options: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[suite]\nname = "bad"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["wrong"]\nworkload = ["t"]\n'
        f'[technique.wrong]\nuse = "{technique}"\n{options}\n[workload.t]\nuse = "train"\nbatch_size = 4\n'
    )
    with pytest.raises(SuiteError, match=reason):
        membench.load_suite(path)


_SUITE = """\
[suite]
name = "activations"
[matrix]
model = ["plain", "dropout"]
technique = ["none", "checkpointing"]
workload = ["steps"]
[[include]]
model = "plain"
technique = ["every-2nd", "accumulate-2", "step-in-backward"]
workload = "steps"
[model.plain]
use = "factory-of-transformers"
function = "tests.shapes:gpt2_without_dropout"
vocabulary_size = 8192
[model.dropout]
use = "factory-of-transformers"
function = "tests.shapes:gpt2_with_dropout"
vocabulary_size = 8192
[technique.every-2nd]
use = "checkpointing"
every_k = 2
[workload.steps]
use = "train"
batch_size = 4
sequence_length = 64
[settings]
measured_steps = 2
evaluate_s = 0
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("activations")
    path = folder / "activations.toml"
    path.write_text(_SUITE)
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def _metric(records: dict[str, Record], model: str, technique: str, name: str) -> float:
    value = records[f"{model}/{technique}/steps/cpu"].metrics[name]
    assert value is not None, records[f"{model}/{technique}/steps/cpu"].message
    return value


# Korthikanti et al. 2022 count a layer's activations in 16-bit: s·b·h·(34 + 5·a·s/h) bytes. Term by term, with
# u = s·b·h and v = a·s²·b elements, and in brackets how many bytes an element takes here, in fp32 on a CPU:
#   norms: their two inputs, 2·2u                                           [2·4u]
#   attention: its input 2u, Q and K 2·2u, V 2u, the projection's input 2u   [5·4u]
#     softmax 2v, its dropout's output 2v and mask v                        [4v, 4v and 4v]
#   feed forward: input 2u, GELU's input 8u, second product's input 8u       [4u, 16u, 16u]
#   masks of the dropouts after attention and feed forward, u + u            [4u + 4u]
# torch's dropout on a CPU keeps a mask in the activations' own type: 4 bytes where a GPU's takes 1. Without dropout
# there are no masks, and its output is its input: 64u + 4v are left of 72u + 12v. A recomputed layer keeps its input
# [4u]. Around the layers: the last norm's input and output [8u], the embedding's mask [4u with dropout], the
# log-softmax of all tokens but the last [4·b·(s−1)·V]. Checkpointed layers share a causal mask [4·b·s²].
_U, _V = _T * _B * shapes.WIDTH, shapes.HEADS * _T**2 * _B
_LAYER = {"plain": 64 * _U + 4 * _V, "dropout": 72 * _U + 12 * _V}
_INPUT, _MASK = 4 * _U, 4 * _B * _T**2
_ENDS = {
    "plain": 8 * _U + 4 * _B * (_T - 1) * shapes.VOCABULARY,
    "dropout": 12 * _U + 4 * _B * (_T - 1) * shapes.VOCABULARY,
}


@pytest.mark.parametrize("model", ["plain", "dropout"])
def test_activations_are_what_is_published(records: dict[str, Record], model: str) -> None:
    kept = _metric(records, model, "none", "activations_bytes")
    assert kept == pytest.approx(shapes.LAYERS * _LAYER[model] + _ENDS[model], rel=0.01)
    kept = _metric(records, model, "checkpointing", "activations_bytes")
    assert kept == pytest.approx(shapes.LAYERS * _INPUT + _MASK + _ENDS[model], rel=0.01)


@pytest.mark.parametrize("model", ["plain", "dropout"])
def test_the_live_peak_falls_by_what_is_published(records: dict[str, Record], model: str) -> None:
    # In both cases forward is highest when all layers are through and the loss is computed: the rest is the same.
    peaks = [_metric(records, model, name, "forward_peak_live_bytes") for name in ("none", "checkpointing")]
    assert peaks[0] - peaks[1] == pytest.approx(shapes.LAYERS * (_LAYER[model] - _INPUT), rel=0.1)


def test_every_second_checkpoint_saves_half(records: dict[str, Record]) -> None:
    kept = _metric(records, "plain", "every-2nd", "activations_bytes")
    expected = shapes.LAYERS / 2 * (_LAYER["plain"] + _INPUT) + _MASK + _ENDS["plain"]
    assert kept == pytest.approx(expected, rel=0.01)


def test_micro_batches_keep_their_share_and_their_parts_add_up_to_a_step(records: dict[str, Record]) -> None:
    whole = _metric(records, "plain", "none", "activations_bytes")
    assert _metric(records, "plain", "accumulate-2", "activations_bytes") == pytest.approx(whole / 2, rel=0.01)
    record = records["plain/accumulate-2/steps/cpu"]
    timed = next(phase for phase in record.processes[0].phases if phase.name == "time")
    durations = timed.parts["forward"].durations_s
    assert len(durations) == 2 * 2
    assert record.metrics["forward_s"] == pytest.approx(sum(durations) / 2)


def test_stepping_in_the_backward_pass_holds_no_gradients_and_keeps_adamws_states(records: dict[str, Record]) -> None:
    parameters = _metric(records, "plain", "none", "trained_weights_bytes") / 4
    held = [_metric(records, "plain", name, "held_live_bytes") for name in ("none", "step-in-backward")]
    assert held[0] - held[1] == pytest.approx(4 * parameters, rel=0.05)
    assert _metric(records, "plain", "step-in-backward", "optimizer_state_bytes") == pytest.approx(
        8 * parameters, rel=0.001
    )


def test_a_switch_of_the_model_counts_as_a_change(records: dict[str, Record]) -> None:
    assert {remark for record in records.values() for remark in record.remarks} == set()
    module = _MODELS["llama"].build(context(_MODELS["llama"]))
    for name, changes in (("sdpa", False), ("eager-attention", True), ("eager-attention", False), ("sdpa", True)):
        before = fingerprint(module)
        _technique(name).apply(module, context(_MODELS["llama"]))
        assert (fingerprint(module) != before) is changes


def _refused(name: str, device: str = "cpu", workload: str = "train", **others: str) -> str | None:
    members = {side: tuple(_technique(other) for other in others.get(side, "").split()) for side in ("before", "after")}
    run = registry.create("workload", workload, {})
    setting = plugins.Setting(_MODELS["llama"], run, device, members["before"], members["after"])
    reason: str | None = _technique(name).refuse(setting)
    return reason


def test_what_cannot_be_had_is_refused_with_its_reason() -> None:
    assert _refused("offload-activations") == (
        "activations are in the CPU's memory already: there is nowhere to offload them to"
    )
    assert _refused("offload-activations", device="cuda:0") is None
    freed = "a member of the stack needs all gradients of a step, and here they are freed"
    for other in ("accumulate-2", "autocast-fp16"):
        assert _refused("step-in-backward", before=other) == freed
        assert _refused("step-in-backward", after=other) == freed
    assert _refused("step-in-backward", after="sgd-momentum") == (
        "a member after it brings an optimizer: it must come before"
    )
    assert _refused("step-in-backward", before="bf16 sgd-momentum") is None


@pytest.mark.parametrize("workload", ["forward", "generate"])
def test_what_acts_on_training_is_refused_without_it(workload: str) -> None:
    for name in ("checkpointing", "accumulate-4", "step-in-backward", "offload-activations"):
        assert "this workload has none" in (_refused(name, "cuda", workload) or "")
    for name in ("chunked-cross-entropy", "fused-linear-cross-entropy"):
        assert "this workload has no loss" in (_refused(name, "cuda", workload) or "")
    for name in ("sdpa", "eager-attention"):
        assert _refused(name, "cuda", workload) is None


def test_it_steps_early_with_the_optimizer_of_a_member_before_it() -> None:
    stack = [_technique("sgd-momentum", learning_rate=0.1)]
    plain, early = train(_MODELS["llama"], stack), train(_MODELS["llama"], [*stack, _technique("step-in-backward")])
    assert early.largest_difference(plain) == 0.0
    assert _elements(early.optimizer_state) == sum(parameter.numel() for parameter in plain.module.parameters())
