"""How long quality is judged, over how much text, and what becomes of the logits of references."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.builtin.workloads.forward import Forward
from membench.plugins import Context
from membench.protocol.case import Case
from membench.protocol.readings import QualityReading
from membench.records.comparison import Comparison
from membench.records.record import Record
from membench.regression.judging import judge
from membench.regression.measured import of_records
from membench.running.session import Session
from membench.suite.gates import outcomes
from membench.suite.gates import parse as parse_rule
from membench.suite.tolerances import Tolerances, parse_fail
from membench.worker import quality
from membench.worker.rehearsal_model import RehearsalModel
from membench.worker.time_budget import TimeBudget
from tests import made_up
from tests.repositories import MODEL

_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["own"]
technique = ["none", "bf16"]
workload = ["forward"]
[model.own]
use = "factory"
function = "model:make"
[settings]
threads = 1
measured_steps = 1
"""


@pytest.mark.parametrize(
    ("pieces_s", "within_s", "done"),
    [
        ([1.0] * 20, 100, 20),
        ([1.0] * 20, None, 20),
        ([1.0] * 20, 19.5, 16),  # four more are foreseen to take as long as four did
        ([1.0] * 20, 10, 8),
        ([1.0] * 20, 3, 2),
        ([5.0] * 20, 3, 1),  # one in any case
        ([2.9] + [0.1] * 19, 5, 20),  # what is done once does not count for the others
    ],
)
def test_as_many_pieces_are_done_as_the_time_allows_and_their_number_is_a_power_of_two(
    pieces_s: Sequence[float], within_s: float | None, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s = 100.0
    monkeypatch.setattr("membench.worker.time_budget.time.monotonic", lambda: clock_s)
    budget = TimeBudget(within_s)
    for number, piece_s in enumerate(pieces_s, 1):
        clock_s += piece_s
        if budget.is_used_up(number, len(pieces_s) - number):
            break
    assert number == done


class _Fixed(RehearsalModel):
    """A model whose logits are the same after each token, whatever came before."""

    scale: float = 1.0

    def build(self, context: Context) -> Any:
        import torch

        class Rows(torch.nn.Module):
            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return rows[ids]

        rows = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * self.scale
        return Rows()


def _evaluated(model: _Fixed, folder: Path, within_s: float | None, *, is_reference: bool) -> QualityReading:
    context = Context("cpu", 0, RehearsalModel(), lambda name: pytest.fail(name), {}, folder)
    module, workload = model.build(context), Forward.model_validate({})
    return quality.evaluate(model, module, [], workload, context, folder / "kept.npy", is_reference, within_s)


def test_only_pieces_that_were_judged_of_both_are_paired(tmp_path: Path) -> None:
    import numpy

    whole = _evaluated(_Fixed(scale=1.0), tmp_path, None, is_reference=True)
    all_pieces = len(whole.tokens)
    assert all_pieces > 8
    assert whole.all_pieces is None
    assert quality.note_on_time(whole) is None
    of_whole = _evaluated(_Fixed(scale=2.0), tmp_path, None, is_reference=False)

    # The case has less time than its reference had.
    short = _evaluated(_Fixed(scale=2.0), tmp_path, 1e-9, is_reference=False)
    assert (short.nats, short.tokens) == (of_whole.nats[:1], of_whole.tokens[:1])
    assert short.reference_nats == whole.nats[:1]
    assert short.all_pieces == all_pieces
    assert f"over 1 of {all_pieces} pieces of held-out text, {short.tokens[0]} tokens:" in str(
        quality.note_on_time(short)
    )
    assert short.kl_nats == pytest.approx(of_whole.kl_nats, rel=0.5)  # per token of what was judged

    # The reference had less time than the case.
    reference = _evaluated(_Fixed(scale=1.0), tmp_path, 1e-9, is_reference=True)
    assert numpy.load(tmp_path / "kept.npy").shape == (sum(reference.tokens), 256)
    assert _evaluated(_Fixed(scale=2.0), tmp_path, None, is_reference=False) == short
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.npy"]


def test_a_figure_of_less_text_is_not_held_against_one_of_more() -> None:
    def measured(name: str, tokens: list[int], all_pieces: int | None, kl_nats: float) -> Any:
        read = {"nats": [1.0] * len(tokens), "tokens": tokens, "bytes": [1] * len(tokens), "kl_nats": kl_nats}
        process = made_up.process(quality={**read, "all_pieces": all_pieces} if all_pieces else read)
        record = made_up.record("bf16", kl_nats=kl_nats, weights_bytes=made_up.MIB)
        return of_records([dataclasses.replace(record, processes=(process,))], name)

    tolerances = Tolerances(command_line=[parse_fail("kl:0.01")])
    whole, cut = measured("before", [4, 4], None, 0.1), measured("now", [4], 2, 0.5)
    (pair,) = judge(whole, cut, tolerances).pairs
    (kl,) = [change for change in pair.changes if change.metric.name == "kl"]
    assert kl.verdict == "not judged"
    assert str(kl.reason).startswith("it was judged over all tokens of held-out text, and now over 4;")
    assert judge(whole, cut, tolerances).exit_code == 3
    assert judge(cut, measured("later", [4], 2, 0.5), tolerances).exit_code == 0
    assert judge(cut, measured("later", [4], 2, 0.7), tolerances).exit_code == 1


def test_a_loss_of_less_text_has_no_ratio_to_one_of_more_and_breaks_no_rule() -> None:
    def judged(technique: str, bits: float, tokens: int, all_pieces: int | None) -> Record:
        read = {"nats": [1.0], "tokens": [tokens], "bytes": [1], "kl_nats": 0.0, "reference_nats": [1.0]}
        process = made_up.process(quality={**read, "all_pieces": all_pieces} if all_pieces else read)
        record = made_up.record(technique, bits_per_byte=bits, lost_bits_per_byte=0.0)
        return dataclasses.replace(record, processes=(process,))

    rule = parse_rule("bits_per_byte <= 1.02 * reference")
    reference, less, as_much = judged("none", 1.8, 8, None), judged("bf16", 2.0, 4, 2), judged("bf16", 2.0, 8, None)
    group = reference.group
    cut, whole = (Comparison([reference, other]) for other in (less, as_much))
    assert cut.ratio(group, "bf16", "bits_per_byte") is None
    assert cut.difference(group, "bf16", "bits_per_byte") is None
    assert cut.difference(group, "bf16", "lost_bits_per_byte") == 0.0, "pieces that both have are paired"
    assert whole.ratio(group, "bf16", "bits_per_byte") == pytest.approx(2.0 / 1.8)
    (of_less,), (of_as_much,) = (outcomes([rule], [reference, other]) for other in (less, as_much))
    assert (of_less.holds, of_less.is_unchecked) == (None, True)
    assert of_as_much.holds is False


def _interrupt_after(case: Case, suite: membench.Suite, folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), Session(suite, suite.cases, folder) as session:
        session.measure(case, 0)
        raise KeyboardInterrupt


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> membench.Suite:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL.format(width=32))
    (tmp_path / "small.toml").write_text(_SUITE)
    return membench.load_suite("small.toml")


def test_logits_of_references_are_kept_for_an_interrupted_run_and_removed_when_it_is_done(
    suite: membench.Suite, tmp_path: Path
) -> None:
    none, bf16 = suite.cases
    _interrupt_after(none, suite, tmp_path)
    (kept,) = tmp_path.glob("*.references/*.npy")
    run = membench.run(suite, output=tmp_path, resume=True)
    assert [(record.technique, record.repeat) for record in run.records] == [("none", 0), ("bf16", 0)]
    assert math.isfinite(run.records[1].metrics["kl_nats"] or math.nan)
    assert not kept.parent.exists()

    # A run that was done with them, and goes on with more cases, measures the reference once more.
    alone = membench.run(suite, keep=lambda case_id: case_id == none.id, output=tmp_path)
    assert list(tmp_path.glob("*.references")) == []
    run = membench.run(suite, output=tmp_path, resume=alone.path)
    assert [(record.technique, record.repeat) for record in run.records] == [("none", 0), ("none", 1), ("bf16", 0)]
    assert math.isfinite(run.records[2].metrics["kl_nats"] or math.nan)
    assert list(tmp_path.glob("*.references")) == []
    assert bf16.id == run.records[2].id
