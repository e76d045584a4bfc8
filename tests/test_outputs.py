"""Logits in whatever a module returns, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import membench
from membench import testing
from membench.builtin.workloads.train import Train
from membench.plugins import WrongOutput, last_logits_of, logits_of
from membench.records.record import Record
from membench.worker.output_check import refuse_wrong_output

if TYPE_CHECKING:
    import torch


@dataclass
class _Named:
    logits: Any


@dataclass
class _Other:
    scores: Any


class _Pair(NamedTuple):
    loss: Any
    logits: Any


_FORMS: dict[str, Callable[[Any], object]] = {
    "bare": lambda logits: logits,
    "pair": lambda logits: (logits, None),
    "list": lambda logits: [logits],
    "nested": lambda logits: ((logits, logits.mean()), [None]),
    "after a loss": lambda logits: (logits.mean(), logits),
    "after no loss": lambda logits: (None, logits),
    "mapping": lambda logits: {"loss": logits.mean(), "logits": logits},
    "attribute": lambda logits: _Named(logits),
    "named pair": lambda logits: _Pair(logits.mean(), logits),
    "within a name": lambda logits: {"logits": (logits, None)},
}


@pytest.mark.parametrize("form", _FORMS)
def test_logits_are_found_in(form: str) -> None:
    import torch

    logits = torch.zeros(2, 3, 5, dtype=torch.float16)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert logits_of(_FORMS[form](logits), ids) is logits
    last = logits[:, -1:]
    for returned in (logits, last, last[:, 0]):
        assert last_logits_of(_FORMS[form](returned), ids).shape == (2, 1, 5)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda logits: logits[:, -1:], "a tensor of shape (1, 1, 5)"),
        (lambda logits: logits[0], "a tensor of shape (3, 5)"),
        (lambda logits: logits.argmax(-1), "a tensor of shape (1, 3) of int64"),
        (lambda logits: {"logits": logits[0]}, "a tensor of shape (3, 5) as 'logits'"),
        (lambda logits: {"scores": logits, "n": 1}, "a dict with 'scores': (1, 3, 5), 'n': int"),
        (lambda logits: (logits[0], None), "a tuple of (3, 5), NoneType"),
        (lambda logits: _Other(logits), "a _Other with 'scores': (1, 3, 5)"),
        (lambda logits: None, "None"),
    ],
)
def test_what_holds_no_logits_is_described_in_one_line(form: Callable[[torch.Tensor], object], said: str) -> None:
    import torch

    with pytest.raises(WrongOutput) as raised:
        logits_of(form(torch.zeros(1, 3, 5)), torch.zeros(1, 3, dtype=torch.long))
    wanted = f"the model returned {said} for 1 × 3 token ids: logits must be (batch, tokens, vocabulary)"
    assert str(raised.value).startswith(wanted)


_MODELS = '''\
import torch
from torch import nn


class Gives(nn.Module):
    def __init__(self, wrap, rows=300, predicted=300, positions=None):
        super().__init__()
        self.place = nn.Embedding(positions or 1024, 8)
        self.embed = nn.Embedding(rows, 8)
        self.out = nn.Linear(8, predicted)
        self.wrap = wrap

    def forward(self, words):
        return self.wrap(self.out(self.embed(words) + self.place(torch.arange(words.shape[1], device=words.device))))


class Sums(nn.Module):
    """Sums of embeddings, of which the last is its cache; logits of the last position alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.out = nn.Linear(8, 256)

    def forward(self, ids, past_key_values=None):
        sums = self.embed(ids).cumsum(1) + (0 if past_key_values is None else past_key_values[0])
        return self.out(sums[:, -1]), [sums[:, -1:].clone()]


class Loaded(Gives):
    """One that cannot be run on shapes alone."""

    def forward(self, words):
        assert words.max().item() >= 0
        return super().forward(words)


def pair(): return Gives(lambda logits: (logits, None), rows=300, predicted=320)
def last(): return Gives(lambda logits: logits[:, [-1]])
def flat(): return Loaded(lambda logits: logits.flatten(0, 1))
def short(): return Gives(lambda logits: logits, positions=32)
def loaded(): return Loaded(lambda logits: logits.half(), positions=64)
def sums(): return Sums()
'''

_SUITE = """\
[suite]
name = "outputs"
[matrix]
model = ["pair", "last", "flat", "short", "loaded", "named"]
technique = ["none"]
workload = ["few"]
[[include]]
model = ["pair", "sums"]
technique = ["none"]
workload = ["new"]
[workload.few]
use = "train"
sequence_length = 64
[workload.new]
use = "generate"
prompt_length = 8
new_tokens = 4
[settings]
warmup_steps = 1
measured_steps = 1
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "given_models.py").write_text(_MODELS)
    models = {name: name for name in ("pair", "last", "flat", "short", "loaded", "sums")} | {"named": "pair"}
    text = _SUITE + "".join(
        f'[model.{name}]\nuse = "factory"\nfunction = "given_models:{function}"\n'
        + ("vocabulary_size = 310\n" if name == "named" else "")
        for name, function in models.items()
    )
    (folder / "outputs.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = membench.run(membench.load_suite(folder / "outputs.toml"), output=folder)
    return {record.id: record for record in run.records}


def test_a_pair_is_trained_on_as_many_tokens_as_are_both_embedded_and_predicted(records: dict[str, Record]) -> None:
    record = records["pair/none/few/cpu"]
    assert (record.status, record.message) == ("ok", None)
    assert record.processes[0].quality is not None
    assert record.processes[0].quality.bytes[0] is None  # words by rank: more than 256 tokens are known


def test_a_module_that_cannot_be_run_on_shapes_alone_is_built_and_judged_on_no_more_tokens_than_it_takes(
    records: dict[str, Record],
) -> None:
    record = records["loaded/none/few/cpu"]
    assert (record.status, record.message) == ("ok", None)
    assert record.processes[0].quality is not None
    assert record.processes[0].quality.tokens[0] == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last", "returned a tensor of shape (1, 1, 300) for 1 × 64 token ids: logits must be"
                 " (batch, tokens, vocabulary)"),
        ("flat", "returned a tensor of shape (64, 300) for 1 × 64 token ids: logits must be"
                 " (batch, tokens, vocabulary)"),
        ("short", "cannot be run on 1 × 64 token ids: IndexError: index out of range in self"),
        ("named", "has embeddings of 300 tokens, fewer than vocabulary_size = 310"),
    ],
)  # fmt: skip
def test_a_module_that_gives_no_logits_fails_in_one_line_before_anything_is_measured(
    records: dict[str, Record], name: str, said: str
) -> None:
    record = records[f"{name}/none/few/cpu"]
    assert (record.status, record.ended_in, record.message) == ("failed", None, f"model '{name}' {said}")
    assert not record.processes[0].phases


def test_a_module_without_a_cache_is_skipped_under_generate_before_anything_is_measured(
    records: dict[str, Record],
) -> None:
    record = records["pair/none/new/cpu"]
    assert (record.status, record.ended_in, record.message) == (
        "skipped",
        None,
        "generating needs a module with a key-value cache: its forward takes no past_key_values",
    )


def test_the_last_position_is_enough_to_generate_and_its_quality_is_unknown_with_the_reason(
    records: dict[str, Record],
) -> None:
    record = records["sums/none/new/cpu"]
    assert (record.status, record.message) == ("ok", None)
    assert record.metrics["cache_bytes"] == 8 * 4
    assert record.metrics["kl_nats"] is None
    assert "returned a tuple of (1, 256), list for 1 × 256 token ids" in record.reasons["kl_nats"]


class _Speaks(testing.Tiny):
    """A model of 256 tokens with a tokenizer."""

    most: int = 255

    def encode(self, text: bytes) -> list[int]:
        return [0, self.most]


def test_a_tokenizer_must_not_give_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    workload = Train.model_validate({"sequence_length": 16})
    refuse_wrong_output(workload, testing.context(tmp_path, _Speaks(most=255)), "own")
    with pytest.raises(WrongOutput) as raised:
        refuse_wrong_output(workload, testing.context(tmp_path, _Speaks(most=256)), "own")
    assert str(raised.value) == "model 'own' has a tokenizer that gives token id 256, and knows 256 tokens"
