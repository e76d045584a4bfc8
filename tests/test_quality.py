"""Quality beside memory: held-out text, the reference's logits, paired differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import membench
from membench.builtin.workloads.forward import Forward
from membench.data import corpus
from membench.plugins import Context
from membench.records.record import Record
from membench.worker import quality
from membench.worker.rehearsal_model import RehearsalModel
from tests import made_up

if TYPE_CHECKING:
    import torch
    from torch import nn

_PHASE = {
    "duration_s": 1.0, "parts": {}, "steps": 2, "peak_live_bytes": 1, "peak_live_at_least_bytes": 1,
    "peak_footprint_bytes": 1, "held_live_bytes": 1, "held_footprint_bytes": 1,
}  # fmt: skip


def _figures_of(found: dict[str, Any], is_trained: bool = True) -> Any:
    phases = [{"name": name, **_PHASE} for name in ("load", "apply", "warmup", "run", "time")]
    result = {"weights_bytes": 1, "pinned": True, "disk_bytes": 1, "disk_format": "safetensors", "losses_nats": [],
              "durations_s": [1.0, 1.0], "tokens_per_step": 4, "decoded_tokens": None, "is_trained": is_trained,
              "quality": found}  # fmt: skip
    return made_up.case_figures(phases, result)


def test_bits_per_byte_are_nats_over_bytes_and_perplexity_is_per_token() -> None:
    found = _figures_of({"nats": [10.0, 6.0], "tokens": [4, 4], "bytes": [16, 16]})
    assert found.metrics["bits_per_byte"] == pytest.approx(16 / 32 / math.log(2))
    assert found.metrics["perplexity_per_token"] == pytest.approx(math.exp(16 / 8))


def test_a_difference_comes_from_paired_pieces_with_the_error_of_their_sum() -> None:
    own, theirs = [10.0, 20.0, 31.0], [9.0, 18.0, 30.0]
    found = _figures_of({"nats": own, "reference_nats": theirs, "tokens": [4] * 3, "bytes": [10] * 3,
                         "kl_nats": 0.1, "top1_agreement_percent": 90.0})  # fmt: skip
    in_bits = 1 / 30 / math.log(2)
    assert found.metrics["lost_bits_per_byte"] == pytest.approx(4 * in_bits)
    # The differences are 1, 2, 1: their standard deviation is 0.57735, that of the sum of three √3 times as much.
    assert found.metrics["lost_bits_per_byte_standard_error"] == pytest.approx(1.0 * in_bits, rel=1e-4)


def test_text_that_a_model_cannot_read_gives_no_bits_per_byte() -> None:
    found = _figures_of({"nats": [1.0], "tokens": [1], "bytes": [None]})
    assert found.metrics["bits_per_byte"] is None
    assert found.reasons["bits_per_byte"] == "the model has no tokenizer: no text can be put to it"


def test_what_is_not_finite_is_unknown_with_a_reason() -> None:
    found = _figures_of({"nats": [None], "tokens": [1], "bytes": [1], "kl_nats": None, "top1_agreement_percent": 0.0})
    assert found.metrics["bits_per_byte"] is None
    assert found.reasons == found.reasons | {
        "bits_per_byte": "it is not finite",
        "kl_nats": "the logits are not finite",
    }


def test_no_paragraph_stands_in_both_texts() -> None:
    train, held_out = (set(text.decode().split("\n\n")) for text in corpus.split())
    assert not {paragraph.strip() for paragraph in train} & held_out
    assert 15_000 < len(corpus.split()[1]) < 40_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, Record]:
    path = folder / "quality.toml"
    path.write_text(
        '[suite]\nname = "quality"\n[matrix]\nmodel = ["trained-tiny"]\n'
        'technique = ["none", "nothing", "bf16", "int8-weight-only"]\nworkload = ["forward"]\n'
        '[technique.nothing]\nuse = "ends"\nhow = "nothing"\n[settings]\nmeasured_steps = 2\n'
    )
    run = membench.run(membench.load_suite(path), output=folder)
    assert [record.status for record in run.records] == ["ok"] * 4
    return {record.technique: record for record in run.records}


def test_the_tiny_model_is_really_trained(records: dict[str, Record]) -> None:
    assert 1.5 < (records["none"].metrics["bits_per_byte"] or 0) < 2.2


def test_a_technique_that_changes_nothing_agrees_with_the_reference_in_everything(records: dict[str, Record]) -> None:
    metrics = records["nothing"].metrics
    assert metrics["kl_nats"] == pytest.approx(0, abs=1e-9)
    assert metrics["top1_agreement_percent"] == 100
    assert metrics["lost_bits_per_byte"] == 0
    assert metrics["bits_per_byte"] == records["none"].metrics["bits_per_byte"]


def test_int8_weights_lose_less_than_half_a_percent_and_the_error_is_finer_than_that(
    records: dict[str, Record],
) -> None:
    metrics, bits = records["int8-weight-only"].metrics, records["none"].metrics["bits_per_byte"] or 0
    assert abs(metrics["lost_bits_per_byte"] or 1) < 0.005 * bits
    assert 0 < (metrics["lost_bits_per_byte_standard_error"] or 1) < 0.001
    assert 0 < (metrics["kl_nats"] or 0) < 0.01
    assert 95 < (metrics["top1_agreement_percent"] or 0) < 100


def test_nothing_but_the_runs_file_is_left_when_a_run_is_done(records: dict[str, Record], folder: Path) -> None:
    assert [path.suffix for path in folder.iterdir() if path.name != "quality.toml"] == [".jsonl"]


def test_a_note_names_what_kept_int8_from_its_factor_with_bytes(records: dict[str, Record]) -> None:
    (note,) = records["int8-weight-only"].notes
    assert note.startswith(
        "weights are ×0.37 where ×0.25 is the nominal factor: 64.00 KiB of embeddings left in float32"
    )
    assert records["bf16"].notes == ()


class _Given(RehearsalModel):
    """A module whose logits are what is told, whatever it reads: held-out quality by hand."""

    scale: float = 1.0

    def build(self, context: Context) -> nn.Module:
        import torch

        class Fixed(torch.nn.Module):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return logits[ids]

        # A row of logits for each token: what follows is likelier the nearer it is to the token.
        distance = (torch.arange(256)[:, None] - torch.arange(256)[None]).abs()
        logits = -self.scale * distance.float() / 16
        return Fixed()


def test_divergence_and_agreement_are_those_of_the_distributions(tmp_path: Path) -> None:
    import torch

    context = Context("cpu", 0, RehearsalModel(), lambda name: pytest.fail(name), {}, tmp_path)
    reference, other = _Given(scale=1.0), _Given(scale=-0.5)
    workload, kept = Forward.model_validate({}), tmp_path / "logits.npy"
    quality.evaluate(reference, reference.build(context), [], workload, context, kept, True)
    found = quality.evaluate(other, other.build(context), [], workload, context, kept, False)
    held_out = quality.pieces(other, other.build(context), workload)
    read = torch.tensor([token for piece in held_out for token in piece.ids[:-1]])
    theirs = torch.softmax(reference.build(context)(torch.arange(256)).double(), -1)[read]
    own = torch.softmax(other.build(context)(torch.arange(256)).double(), -1)[read]
    divergence = (theirs * (theirs.log() - own.log())).sum(-1).mean()
    assert found.kl_nats == pytest.approx(divergence.item(), rel=1e-4)
    agreement = (theirs.argmax(-1) == own.argmax(-1)).double().mean()
    assert found.top1_agreement_percent == pytest.approx(100 * agreement.item())
    assert 0 <= (found.top1_agreement_percent or 0) < 1


def test_the_corpus_stands_in_the_record(records: dict[str, Record]) -> None:
    assert {record.processes[0].corpus for record in records.values()} == {corpus.digest()}
