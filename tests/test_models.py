"""Published sizes, on the meta device; models of one's own."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import membench
from membench import plugins
from membench.builtin.models.pretrained import Pretrained
from membench.builtin.models.trained_tiny import TrainedTiny
from membench.builtin.models.transformer import Qwen
from membench.builtin.workloads.forward import Forward
from membench.builtin.workloads.generate import Generate
from membench.data import corpus
from membench.plugins import Workload, registry
from membench.records.record import Record
from membench.running import derived_metrics
from membench.worker import quality

MIB = 2**20

_PUBLISHED = {
    "gpt2-82m": 81_912_576,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-15m": 15_191_712,
    "llama-60m": 58_073_600,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "qwen-0.5b": 494_032_768,
    "qwen-1.5b": 1_543_714_304,
    "qwen-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", _PUBLISHED)
@pytest.mark.filterwarnings("ignore")  # what transformers warns of while importing is not ours
def test_a_model_has_as_many_parameters_as_was_published(name: str) -> None:
    model = registry.create("model", name, {})
    assert sum(parameter.numel() for parameter in model.skeleton().parameters()) == _PUBLISHED[name]


_FACTORY = """\
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 16384)
        self.out = nn.Linear(16384, 256)

    def forward(self, ids):
        return self.out(self.embed(ids))


def make():
    return Plain()
"""


def test_any_module_from_a_function_is_measured_and_what_it_cannot_do_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(_FACTORY)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.toml"
    path.write_text(
        '[suite]\nname = "own"\n[matrix]\nmodel = ["plain"]\ntechnique = ["none", "int8-weight-only"]\n'
        'workload = ["forward", "train", "generate"]\n[model.plain]\nuse = "factory"\n'
        'function = "my_models:make"\n[settings]\nmeasured_steps = 2\n'
    )
    records = {record.id: record for record in membench.run(membench.load_suite(path), output=tmp_path).records}
    forward = {name: records[f"plain/{name}/forward/cpu"] for name in ("none", "int8-weight-only")}
    assert [record.status for record in forward.values()] == ["ok", "ok"]
    plain_bytes = 4 * 2 * 256 * 16384
    assert forward["none"].metrics["held_live_bytes"] == pytest.approx(plain_bytes, rel=0.05)
    # The embedding stays as it is; a weight of the linear layer takes one byte.
    assert forward["int8-weight-only"].metrics["held_live_bytes"] == pytest.approx(plain_bytes * 5 / 8, rel=0.05)
    assert (forward["int8-weight-only"].metrics["kl_nats"] or 0) > 0
    assert records["plain/none/train/cpu"].status == "ok"
    generated = records["plain/none/generate/cpu"]
    assert (generated.status, generated.message) == (
        "skipped",
        "generating needs a module with a key-value cache: its forward takes no past_key_values",
    )


@pytest.mark.filterwarnings("ignore")
def test_a_pretrained_model_is_read_from_a_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    module = LlamaForCausalLM(config)
    module.save_pretrained(tmp_path / "model")
    path = tmp_path / "pretrained.toml"
    path.write_text(
        '[suite]\nname = "pretrained"\n[matrix]\nmodel = ["here", "hub"]\ntechnique = ["none"]\n'
        f'workload = ["forward"]\n[model.here]\nuse = "pretrained"\nsource = "{tmp_path}/model"\n'
        '[model.hub]\nuse = "pretrained"\nsource = "nobody/nothing"\n[settings]\nmeasured_steps = 1\n'
    )
    here, hub = membench.run(membench.load_suite(path), output=tmp_path).records
    assert here.status == "ok"
    weights_bytes = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert here.metrics["weights_bytes"] == weights_bytes
    # Mapped from the file they would be no live memory, and whatever is converted would seem to cost.
    load = here.processes[0].phase("load")
    assert load is not None
    assert load.peak_live_bytes is not None
    assert load.held_live_bytes == pytest.approx(weights_bytes, rel=0.05)
    assert load.peak_live_bytes < 1.2 * weights_bytes + 2 * derived_metrics.resolution_bytes()
    assert here.metrics["bits_per_byte"] is None
    assert here.reasons["bits_per_byte"] == "the model has no tokenizer: no text can be put to it"
    assert hub.status == "failed"
    assert "source = 'nobody/nothing' is no folder here and cannot be had from the hub" in (hub.message or "")


def _checkpoint(folder: Path, *, tied: bool = False) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=tied)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder / "model.safetensors"


def _run_pretrained(folder: Path, options: str = "") -> Record:
    path = folder / "pretrained.toml"
    path.write_text(
        '[suite]\nname = "pretrained"\n[matrix]\nmodel = ["here"]\ntechnique = ["none"]\nworkload = ["forward"]\n'
        f'[model.here]\nuse = "pretrained"\nsource = "model"\n{options}\n[settings]\nmeasured_steps = 1\n'
    )
    (record,) = membench.run(membench.load_suite(path), output=folder).records
    return record


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_one_that_may_lack_it_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    saved = _checkpoint(tmp_path / "model")
    tensors = load_file(saved)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, saved, metadata={"format": "pt"})
    for options in ("", 'allow_missing = ["lm_head.*"]'):
        with pytest.raises(membench.MembenchError) as raised:
            _run_pretrained(tmp_path, options)
        assert (raised.value.exit_code, str(raised.value)) == (
            2,
            "model 'here': source = 'model': the checkpoint lacks model.layers.1.mlp.up_proj.weight; if the task does"
            " not need that, list names or patterns in allow_missing",
        )
    assert not list(tmp_path.glob("*.jsonl"))
    allowed = _run_pretrained(tmp_path, 'allow_missing = ["model.layers.*.up_proj.*"]')
    assert allowed.status == "ok"
    assert allowed.metrics["bits_per_byte"] is None
    reason = "weights that the checkpoint lacks are random: model.layers.1.mlp.up_proj.weight"
    assert allowed.reasons["bits_per_byte"] == allowed.reasons["perplexity_per_token"] == reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_missing_unexpected_and_mismatched_tensors_are_named_and_tied_ones_are_not_missing(
    tmp_path: Path, *, tied: bool
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    saved = _checkpoint(tmp_path, tied=tied)
    tensors = load_file(saved)
    assert ("lm_head.weight" in tensors) is not tied
    model = Pretrained(source=str(tmp_path))
    context = plugins.Context("cpu", 0, model, lambda name: contextlib.nullcontext(), {}, tmp_path)
    model.build(context)
    names = [name for name in tensors if name.startswith("model.layers.")][:7]
    for name in names:
        del tensors[name]
    tensors |= {"model.norm.weight": torch.ones(3), "score.weight": torch.ones(2)}
    save_file(tensors, saved, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks") as raised:
        model.build(context)
    assert str(raised.value) == (
        f"source = '{tmp_path}': the checkpoint lacks {', '.join(sorted(names)[:5])} and 2 more; has another shape of"
        " model.norm.weight ([3], not [32]); has in addition score.weight; if the task does not need that, list names"
        " or patterns in allow_missing and allow_unexpected"
    )
    allowed = Pretrained(
        source=str(tmp_path), allow_missing=("model.layers.*", "model.norm.*"), allow_unexpected=("score.weight",)
    )
    allowed.build(context)


@pytest.mark.filterwarnings("ignore")
def test_a_piece_of_text_counts_the_bytes_of_the_tokens_that_are_predicted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([corpus.split()[0].decode()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    module = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    )
    module.save_pretrained(tmp_path)
    model = Pretrained.model_validate({"source": str(tmp_path)})
    found = quality.pieces(model, module, Forward.model_validate({}))
    assert len(found) > 8
    for piece in found:  # a character of several bytes may lie across two pieces
        assert piece.bytes == pytest.approx(len(tokenizer.decode(piece.ids[1:]).encode()), abs=4)
    predicted = [token for piece in found for token in piece.ids[1:]]
    assert sum(piece.bytes or 0 for piece in found) == len(tokenizer.decode(predicted).encode())


@pytest.mark.parametrize(
    ("workload", "length"),
    [(Forward.model_validate({}), 256), (Generate.model_validate({"prompt_length": 480, "new_tokens": 33}), 513)],
)
def test_pieces_of_text_are_as_long_as_what_is_generated(workload: Workload, length: int) -> None:
    model = TrainedTiny()
    found = quality.pieces(model, model.skeleton(), workload)
    assert {len(piece.ids) - 1 for piece in found[:-1]} == {length}
    assert all(piece.bytes == len(piece.ids) - 1 for piece in found)


def test_a_large_vocabulary_still_leaves_eight_pieces_for_a_standard_error() -> None:
    model = Qwen.model_validate({"size": "0.5b"})
    found = quality.pieces(model, model.skeleton(), Forward.model_validate({}))
    assert len(found) >= 8


@pytest.mark.parametrize("name", ["gpt2-82m", "qwen-0.5b"])
@pytest.mark.filterwarnings("ignore")
def test_other_families_take_tokens_and_give_logits(name: str) -> None:
    import torch

    model = registry.create("model", name, {})
    small = model.miniature()
    context = plugins.Context("cpu", 0, small, lambda _: contextlib.nullcontext(), {}, Path("."))
    module = small.build(context)
    assert module(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 512)


def test_a_cache_file_that_was_cut_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from membench.builtin.models import trained_tiny

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(trained_tiny._RECIPE, "steps", 1)
    model = trained_tiny.TrainedTiny()
    model.prepare(lambda done, total, what: None)
    whole = model.path().read_bytes()
    model.path().write_bytes(whole[: len(whole) // 2])
    model.prepare(lambda done, total, what: None)
    assert model.path().read_bytes() == whole
