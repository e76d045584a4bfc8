"""Stages of a pipeline: the same training as on one device, each stage's weights, and what schedules hold."""

from __future__ import annotations

import contextlib
import functools
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from membench.builtin.techniques.parallel.pipeline import Pipeline
from membench.builtin.techniques.parallel.stages import Stages
from membench.builtin.workloads import training
from membench.builtin.workloads.train import next_token_loss
from membench.plugins import Setting, Unsuitable, logits_of, registry
from membench.plugins.ranks import Ranks
from membench.records.record import Record
from membench.worker.decoder import Block, Decoder
from tests import parallel
from tests.on_ranks import on_ranks

_LAYERS, _ROWS, _TOKENS = 4, 4, 256
_WEIGHTS_BYTES = [
    parallel.EMBEDDING_BYTES + 2 * parallel.LAYER_BYTES,
    2 * parallel.LAYER_BYTES + 4 * parallel.WIDTH + parallel.EMBEDDING_BYTES,
]
_LOGITS_BYTES = _ROWS * _TOKENS * parallel.VOCABULARY * 4
_SUITE = f"""
[suite]
name = "pipeline"
[matrix]
model = ["small"]
technique = ["none", "gpipe", "1f1b"]
workload = ["short"]
device = ["2xcpu"]
[[include]]
model = "small"
technique = "1f1b"
workload = "prefill"
device = "2xcpu"
[technique.gpipe]
use = "pipeline"
schedule = "gpipe"
return_outputs = false
[technique.1f1b]
use = "pipeline"
[workload.short]
use = "train"
batch_size = {_ROWS}
sequence_length = {_TOKENS}
[workload.prefill]
use = "forward"
batch_size = {_ROWS}
sequence_length = {_TOKENS}
"""
_STEPS, _RATE = 3, 0.5


def _llama(layers: int = _LAYERS) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module: nn.Module = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, vocab_size=128,
        max_position_embeddings=64, tie_word_embeddings=False,
    ))  # fmt: skip
    return module


def _qwen() -> nn.Module:
    """An embedding that is the head, too, and layers that attend to all or to a few tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    module: nn.Module = Qwen2ForCausalLM(Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=4, max_window_layers=2,
    ))  # fmt: skip
    return module


def _gpt2() -> nn.Module:
    """Learned positions, and an embedding that is the head, too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module: nn.Module = GPT2LMHeadModel(GPT2Config(
        n_embd=32, n_layer=5, n_head=2, vocab_size=128, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ))  # fmt: skip
    return module


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(width=32, layers=4, heads=2, inner_width=64, vocabulary=128)


_CASES = {
    "gpipe": ({"schedule": "gpipe"}, _llama),
    "1f1b": ({"schedule": "1f1b"}, _llama),
    "quiet": ({"schedule": "1f1b", "return_outputs": False}, _llama),
    "interleaved": ({"schedule": "interleaved"}, _llama),
    "zb": ({"schedule": "zb"}, _llama),
    "tied": ({}, _qwen),
    "positions": ({"schedule": "gpipe"}, _gpt2),
    "plain": ({}, _plain),
}


def _batches() -> Any:
    drawn = torch.Generator().manual_seed(1)
    return lambda: torch.randint(128, (8, 16), generator=drawn)


def _context(ranks: Ranks | None, *, rehearsal: bool = False) -> Any:
    return SimpleNamespace(
        device="cpu", ranks=ranks, inventory={}, rehearsal=rehearsal, part=lambda name: contextlib.nullcontext()
    )


def _steps(module: nn.Module, techniques: tuple[Any, ...], context: Any) -> list[float | None]:
    step = training.steps(module, _batches(), next_token_loss, "sgd", _RATE, techniques, context)
    losses = [step() for _ in range(_STEPS)]
    return [None if loss is None else loss.item() for loss in losses]


def _trained_on_ranks(folder: Path) -> dict[str, Any]:
    """Train each case on this rank, and save it: losses, final weights, the logits that evaluation gets, its file."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stage",))
    ranks = Ranks(distributed.get_rank(), 2, mesh, folder)
    context = _context(ranks)
    found: dict[str, Any] = {}
    for name, (options, make) in _CASES.items():
        technique = Pipeline.model_validate(options)
        module = technique.parallelize(make(), context)
        losses = _steps(module, (technique,), context)
        module.eval()
        ids = _batches()()[:1]
        with torch.no_grad():
            logits = technique.whole_logits(logits_of(module(ids), ids), context)
        technique.save(module, folder / name, context)
        written = torch.load(folder / name / f"stage-{ranks.number}.pt")
        found[name] = (losses, {key: value.clone() for key, value in module.state_dict().items()}, logits, written)
    # A miniature may have fewer layers than there are stages.
    rehearsed, context = Pipeline.model_validate({"schedule": "interleaved"}), _context(ranks, rehearsal=True)
    found["rehearsal"] = _steps(rehearsed.parallelize(_llama(1), context), (rehearsed,), context)
    return found


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(functools.partial(_trained_on_ranks, folder), folder)


@pytest.mark.parametrize("name", _CASES)
def test_stages_train_as_the_whole_model_does(name: str, on_two: list[dict[str, Any]]) -> None:
    whole = _CASES[name][1]()
    expected = _steps(whole, (), _context(None))
    first, last = (each[name] for each in on_two)
    assert first[0] == [None] * _STEPS, "only the last stage has a loss"
    assert last[0] == pytest.approx(expected, abs=1e-5)
    # Together the stages have the weights of the whole model, after the same steps.
    weights = whole.state_dict()
    assert first[1].keys() | last[1].keys() == weights.keys()
    for state in (first[1], last[1]):
        for key, value in state.items():
            torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", _CASES)
def test_held_out_text_is_judged_by_the_logits_of_all_stages_on_every_rank(
    name: str, on_two: list[dict[str, Any]]
) -> None:
    whole = _CASES[name][1]()
    _steps(whole, (), _context(None))
    ids = _batches()()[:1]
    with torch.no_grad():
        expected = logits_of(whole.eval()(ids), ids)
    for rank in on_two:
        torch.testing.assert_close(rank[name][2], expected, rtol=1e-3, atol=1e-4)


def test_only_weights_that_both_ends_need_are_on_both(on_two: list[dict[str, Any]]) -> None:
    shared = {name: sorted(on_two[0][name][1].keys() & on_two[1][name][1].keys()) for name in ("1f1b", "tied")}
    # Of the tied pair the first stage has the embedding, and the last the head, under their own names.
    assert shared == {"1f1b": [], "tied": []}
    first, last = (each["tied"][1] for each in on_two)
    torch.testing.assert_close(first["model.embed_tokens.weight"], last["lm_head.weight"], rtol=0, atol=0)
    layers = [{key.split(".")[2] for key in each["interleaved"][1] if ".layers." in key} for each in on_two]
    assert layers == [{"0", "2"}, {"1", "3"}], "each rank has two stages, not beside each other"


@pytest.mark.parametrize("name", _CASES)
def test_stages_save_each_weight_once(name: str, on_two: list[dict[str, Any]]) -> None:
    first, last = (each[name] for each in on_two)
    assert not first[3].keys() & last[3].keys()
    behind = {"lm_head.weight"} if name in ("tied", "positions") else set()
    assert (first[3].keys(), last[3].keys()) == (first[1].keys(), last[1].keys() - behind)
    for (_, state, _, written), key in ((each, key) for each in (first, last) for key in each[3]):
        assert torch.equal(written[key], state[key])


def test_a_miniature_with_fewer_layers_than_stages_is_rehearsed_all_the_same(on_two: list[dict[str, Any]]) -> None:
    assert on_two[0]["rehearsal"] == [None] * _STEPS
    assert all(loss > 0 for loss in on_two[1]["rehearsal"])


def _trained_on_a_mesh() -> dict[str, Any]:
    """Train two halves of the batch in two stages each: losses, and final weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    context, found = _context(Ranks(distributed.get_rank(), 4, mesh, Path())), {}
    for name, sharing in (("1f1b", "ddp"), ("tied", "zero1")):
        options, make = _CASES[name]
        # The order in a stack does not matter: stages come first, then what wraps them.
        members = (registry.create("technique", sharing, {}), Pipeline.model_validate(options))
        module = make()
        for technique in reversed(members):
            module = technique.parallelize(module, context)
        losses = _steps(module, members, context)
        found[name] = (losses, {key: value.clone() for key, value in module.state_dict().items()})
    return found


def test_gradients_of_each_stage_are_averaged_over_ranks_that_share_the_batch(tmp_path: Path) -> None:
    ranks = on_ranks(_trained_on_a_mesh, tmp_path, 4)
    for name in ranks[0]:
        whole = _CASES[name][1]()
        expected = _steps(whole, (), _context(None))
        assert [each[name][0] for each in ranks[::2]] == [[None] * _STEPS] * 2
        means = [statistics.fmean(both) for both in zip(*(each[name][0] for each in ranks[1::2]), strict=True)]
        assert means == pytest.approx(expected, abs=1e-5)
        for rank in ranks:
            for key, value in rank[name][1].items():
                torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-4, atol=1e-5)


class _Positions(Decoder):
    """Has a weight that belongs to no module which runs before the layers."""

    def __init__(self) -> None:
        super().__init__(width=32, layers=4, heads=2, inner_width=64, vocabulary=128)
        self.shift = nn.Parameter(torch.zeros(32))


class _Doubled(Decoder):
    """Runs its layers twice."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class _Skipping(Decoder):
    """Adds what the embedding returns behind the layers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = first = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x + first))
        return logits


def _of(kind: type[Decoder]) -> nn.Module:
    return kind() if kind is _Positions else kind(width=32, layers=4, heads=2, inner_width=64, vocabulary=128)


def _sharing() -> nn.Module:
    module = _of(Decoder)
    blocks: Any = module.blocks
    first, last = blocks[0], blocks[3]
    assert isinstance(first, Block)
    last.mlp = first.mlp
    return module


@pytest.mark.parametrize(
    ("make", "stages", "reason"),
    [
        (lambda: _of(Decoder), 5, "5 stages need as many layers, and the model has 4"),
        (lambda: _of(_Positions), 2, "'shift' of a _Positions belongs to no stage"),
        (lambda: _of(_Doubled), 2, "a _Doubled does not run its layers 'blocks.*' (4 Block) one after the other"),
        (lambda: _of(_Skipping), 2, "a _Skipping cannot be cut into stages between its layers: it then computes other"),
        (_sharing, 2, "layers of a Decoder in different stages share weights|shares its weights"),
    ],
)
def test_a_model_that_cannot_be_cut_between_its_layers_is_refused(make: Any, stages: int, reason: str) -> None:
    with pytest.raises(Unsuitable) as caught:
        Stages(make(), stages, None, longer=False)
    assert any(part in str(caught.value) for part in reason.split("|"))


@pytest.mark.parametrize(
    ("options", "ranks", "workload", "others", "reason"),
    [
        ({}, 2, "generate", (), "torch's schedules have no key-value cache"),
        ({}, 2, "read-data", (), "there are no layers of a decoder to share out among stages"),
        ({"micro_batches": 3}, 2, "train", (), "8 rows cannot be shared out among micro_batches = 3"),
        ({"micro_batches": 2}, 4, "train", (), "schedule = '1f1b' needs as many micro-batches as stages"),
        ({"schedule": "zb", "micro_batches": 8}, 3, "train", (), None),
        ({"schedule": "interleaved"}, 1, "train", (), "schedule = 'interleaved' needs several ranks"),
        (
            {"schedule": "zb"},
            4,
            "train",
            ("ddp",),
            "does not go backward through all of a module",
        ),
        ({}, 2, "train", ("accumulate",), "micro-batches are an option of it"),
        ({}, 2, "forward", ("accumulate",), None),
        ({}, 2, "train", ("step-in-backward",), "'step-in-backward' would update weights after the first"),
        ({}, 2, "train", ("fused-linear-cross-entropy",), "the loss takes head and decoder apart"),
        ({}, 2, "train", ("chunked-cross-entropy", "checkpointing", "bf16"), None),
        ({}, 4, "train", ("ddp",), None),
        ({"checkpoint": "sharded"}, 2, "train", (), None),
        ({"checkpoint": "gathered"}, 2, "train", (), "each stage is saved by its rank: leave checkpoint = 'gathered'"),
        ({}, 4, "train", ("sharded-ddp",), "each stage is saved by its rank: leave checkpoint = 'sharded' out"),
    ],
)
def test_what_has_no_meaning_with_stages_is_refused_with_the_reason(
    options: dict[str, Any], ranks: int, workload: str, others: tuple[str, ...], reason: str | None
) -> None:
    work = registry.create("workload", workload, {} if workload == "generate" else {"batch_size": 8})
    before = tuple(
        registry.create(
            "technique", name.removeprefix("sharded-"), {"checkpoint": "sharded"} if "sharded" in name else {}
        )
        for name in others
    )
    setting = Setting(registry.create("model", "untrained-tiny", {}), work, "cpu", before, (), ranks)
    refused = Pipeline.model_validate(options).refuse(setting)
    assert refused is None if reason is None else reason in str(refused)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    return parallel.run(_SUITE, tmp_path_factory.mktemp("pipeline"))


def _run(record: Record, rank: int) -> Any:
    phase = record.processes[rank].phase("run")
    assert phase is not None
    return phase


def _activations_bytes() -> int:
    """Return what two layers keep for going backward with one row, by autograd's own account."""
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(
        hidden_size=parallel.WIDTH, intermediate_size=parallel.INNER_WIDTH, num_hidden_layers=2,
        num_attention_heads=parallel.HEADS, vocab_size=8,
    ))  # fmt: skip
    kept: dict[int, Any] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.randn(1, _TOKENS, parallel.WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=hidden).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_each_rank_has_its_stages_weights_and_their_states(records: dict[str, Record]) -> None:
    for technique in ("gpipe", "1f1b"):
        record = records[f"small/{technique}/short/2xcpu"]
        assert (record.status, record.message) == ("ok", None)
        for process, expected in zip(record.processes, _WEIGHTS_BYTES, strict=True):
            assert process.modules_bytes is not None
            assert sum(each.bytes for each in process.modules_bytes) == pytest.approx(expected, rel=0.005)
            assert process.breakdown_bytes is not None
            assert process.breakdown_bytes["optimizer"]["optimizer"] == pytest.approx(2 * expected, rel=0.005)


def test_gpipe_holds_the_activations_of_one_or_two_micro_batches_more_than_1f1b_on_the_first_of_two_stages(
    records: dict[str, Record],
) -> None:
    gpipe, one_each = (_run(records[f"small/{name}/short/2xcpu"], 0) for name in ("gpipe", "1f1b"))
    difference = gpipe.peak_live_bytes - one_each.peak_live_bytes
    # Of four micro-batches against two; the peak of 1F1B may lie elsewhere, with the embedding's gradient.
    assert 1 <= difference / _activations_bytes() <= _ROWS - 2


def test_the_last_stage_keeps_the_logits_of_all_micro_batches_unless_outputs_are_not_returned(
    records: dict[str, Record],
) -> None:
    quiet, returning = (records[f"small/{name}/short/2xcpu"] for name in ("gpipe", "1f1b"))
    held = [[_run(record, rank).held_live_bytes for rank in (0, 1)] for record in (quiet, returning)]
    assert held[1][1] - held[0][1] == pytest.approx(_LOGITS_BYTES, rel=0.03)
    assert held[1][0] - held[0][0] == pytest.approx(0, abs=0.03 * _LOGITS_BYTES)


def test_a_pipelines_losses_are_the_references_and_its_schedule_is_one_part_of_the_step(
    records: dict[str, Record],
) -> None:
    reference = records["small/none/short/cpu"].processes[0].losses_nats
    assert reference
    for technique in ("gpipe", "1f1b"):
        first, last = records[f"small/{technique}/short/2xcpu"].processes
        assert not first.losses_nats
        assert last.losses_nats is not None
        assert list(last.losses_nats[: len(reference)]) == pytest.approx(reference, abs=1e-4)
        assert set(first.phase("run").parts) == {"schedule", "optimizer"}  # type: ignore[union-attr]


def test_going_forward_alone_each_stage_has_its_weights_and_no_gradients(records: dict[str, Record]) -> None:
    record = records["small/1f1b/prefill/2xcpu"]
    assert (record.status, record.message) == ("ok", None)
    first, last = (_run(record, rank).held_live_bytes for rank in (0, 1))
    assert first == pytest.approx(_WEIGHTS_BYTES[0], abs=_LOGITS_BYTES / 8)
    # Logits stay until the next step, as torch keeps them.
    assert last - first == pytest.approx(_LOGITS_BYTES, rel=0.03)
    assert record.metrics["imbalance_ratio"] is not None
    assert record.metrics["imbalance_ratio"] > 1.2
