"""Whether ranks train as a single device does: losses beside the reference's, step by step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import pytest

import membench
from membench.protocol.case import Case, Plugin
from membench.records.record import Record
from membench.running.derived_metrics import DerivedMetrics
from membench.running.losses import KnownLosses, LossesAlone, add, mean_over_ranks
from membench.running.session import run
from membench.suite.loading import load_suite
from tests import made_up


def _found(
    ranks: Sequence[Sequence[float | None] | None],
    reference: Sequence[float | None] | None,
    unspread: Sequence[float | None] | None = None,
    bits: float | None = 32,
) -> DerivedMetrics:
    found = DerivedMetrics()
    name = "none on cpu" if unspread is None else "bf16 on cpu"
    add(found, ranks, LossesAlone(reference, reference if unspread is None else unspread, name), bits)
    return found


def test_the_loss_of_a_step_is_the_mean_over_the_ranks_that_have_one() -> None:
    assert list(mean_over_ranks([[2.0, 4.0], [4.0, 8.0]])) == [3.0, 6.0]
    assert list(mean_over_ranks([None, [4.0, 8.0], []])) == [4.0, 8.0], "a pipeline's first stage has none"
    assert list(mean_over_ranks([[2.0, None], [4.0, 8.0]])) == [3.0, None]
    assert list(mean_over_ranks([None, None])) == []


def test_the_largest_difference_counts_over_the_steps_that_both_have() -> None:
    found = _found([[5.0, 4.0, 3.0, 9.0], [5.0, 5.0, 3.0, 9.0]], [5.0, 4.25, 3.0])
    assert found.metrics["loss_difference_nats"] == 0.25
    assert found.metrics["final_loss_nats"] == 3.0, "of the reference's last step: the next has another batch"
    assert "over 3 steps" in found.obtained["loss_difference_nats"]["source"]


@pytest.mark.parametrize(
    ("bits", "apart", "is_explained"),
    [(32, 4e-5, True), (32, 1e-3, False), (16, 1e-3, True), (16, 0.1, False), (8, 0.1, True), (8, 1.0, False)],
)
def test_numbers_of_fewer_bits_explain_larger_differences(bits: int, apart: float, is_explained: bool) -> None:
    found = _found([[5.0, 5.0 + apart]], [5.0, 5.0], bits=bits)
    assert bool(found.remarks) is not is_explained
    assert found.obtained["loss_difference_nats"]["explained_nats"] == pytest.approx(
        {32: 1e-4, 16: 10 * 2**-8, 8: 0.1}[bits]
    )


def test_a_difference_that_arithmetic_does_not_explain_names_the_step_and_both_losses() -> None:
    assert _found([[5.0, 4.0, 3.9], [5.0, 4.2, 4.0]], [5.0, 4.7, 4.0]).remarks == [
        "it is not the same training as none on cpu: the loss of step 2 is 4.1000 nats, not 4.7000, and arithmetic in"
        " 32 bits explains 9.4e-05"
    ]


def test_what_other_members_of_a_stack_change_is_not_held_against_its_ranks() -> None:
    # In bf16 a single device is as far from the reference as the ranks are.
    found = _found([[5.0, 4.5]], [5.0, 4.0], unspread=[5.0, 4.5], bits=16)
    assert found.metrics["loss_difference_nats"] == 0.5
    assert found.remarks == []
    assert found.obtained["loss_difference_nats"]["same_training"] == "bf16 on cpu"


def test_a_training_that_is_not_finite_is_compared_up_to_there() -> None:
    assert _found([[5.0, None]], [5.5, 5.0]).metrics["loss_difference_nats"] == 0.5
    found = _found([[None, None]], [5.5, 5.0])
    assert found.reasons["loss_difference_nats"] == "the losses of the first step are not finite"
    assert found.reasons["final_loss_nats"] == "it is not finite"


def test_without_the_reference_the_difference_is_unknown_and_without_a_loss_there_is_none() -> None:
    assert _found([[5.0]], None).reasons["loss_difference_nats"] == "the reference was not measured before"
    assert _found([None, None], [5.0]).metrics == {}


def test_a_stack_whose_training_on_one_device_is_not_known_is_not_judged_and_says_so() -> None:
    found = DerivedMetrics()
    add(found, [[5.0, 1.0]], LossesAlone([5.0, 4.0], None, "bf16 on cpu"), 16)
    assert (found.metrics["loss_difference_nats"], found.remarks) == (3.0, [])
    assert found.notes == ["whether it is the same training was not judged: bf16 on cpu was not measured"]


_SUITE = """
[suite]
name = "ranks"
[matrix]
model = ["untrained-tiny"]
technique = ["none", "wrong+ddp"]
workload = ["short"]
device = ["2xcpu"]
[workload.short]
use = "train"
batch_size = 2
sequence_length = 32
[settings]
warmup_steps = 1
measured_steps = 1
calm_within_s = 0
evaluate_s = 1
"""

_WRONG = '''
import dataclasses
from membench.plugins import Technique

class Wrong(Technique):
    """Trains with losses of twice the size where it runs in ranks."""
    def training_step(self, step, context):
        if context.ranks is None:
            return step
        return dataclasses.replace(step, loss=lambda module, rows: 2 * step.loss(module, rows))
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[membench.Run, membench.Run]:
    """A run of the single device that is resumed with all the rest, before and after."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "membench_plugins.py").write_text(_WRONG)
    (folder / "ranks.toml").write_text(_SUITE)
    suite = load_suite(folder / "ranks.toml")
    begun = run(suite, keep=lambda case_id: case_id.endswith("/cpu"), output=folder)
    return begun, run(suite, output=folder, resume=True)


def _by_technique(run: membench.Run) -> dict[str, Record]:
    return {f"{record.technique}/{record.case['device']}": record for record in run.records if not record.repeat}


def test_a_resumed_run_holds_ranks_against_the_losses_of_before(runs: tuple[membench.Run, membench.Run]) -> None:
    begun, whole = runs
    assert {record.case["device"] for record in begun.records} == {"cpu"}
    found = _by_technique(whole)
    assert {name: record.status for name, record in found.items()} == dict.fromkeys(
        ["none/cpu", "wrong/cpu", "ddp/2xcpu", "wrong+ddp/2xcpu"], "ok"
    )
    ddp = found["ddp/2xcpu"]
    assert ddp.metrics["loss_difference_nats"] == pytest.approx(0, abs=1e-5)
    assert ddp.remarks == ()
    first, second = (process.losses_nats or () for process in ddp.processes)
    reference = found["none/cpu"].processes[0].losses_nats
    assert first[0] != second[0], "each rank has other rows"
    assert reference is not None
    assert (first[0] + second[0]) / 2 == pytest.approx(reference[0], rel=1e-6)  # type: ignore[operator]
    assert len(first) == len(second) == len(reference), "what a model has learned compares after as many steps"
    assert ddp.metrics["final_loss_nats"] == pytest.approx((first[-1] + second[-1]) / 2)  # type: ignore[operator]


def test_a_training_that_is_another_one_on_ranks_is_remarked_on(runs: tuple[membench.Run, membench.Run]) -> None:
    wrong = _by_technique(runs[1])["wrong+ddp/2xcpu"]
    (remark,) = wrong.remarks
    assert remark.startswith("it is not the same training as wrong on cpu: the loss of step")


def test_ranks_are_held_against_the_logits_of_the_single_device(runs: tuple[membench.Run, membench.Run]) -> None:
    assert _by_technique(runs[1])["ddp/2xcpu"].metrics["kl_nats"] == pytest.approx(0, abs=1e-4)


def test_a_run_on_one_device_and_on_ranks_is_a_run_of_one_machine(runs: tuple[membench.Run, membench.Run]) -> None:
    assert len({json.dumps(record.machine, sort_keys=True) for record in runs[1].records}) == 1


def test_losses_of_ranks_and_of_cases_that_failed_are_no_reference() -> None:
    alone = made_up.record("none", "train")
    trained = dataclasses.replace(alone, processes=(made_up.process(losses_nats=[5.0, 4.0]),))
    failed = dataclasses.replace(trained, status="failed")
    in_ranks = dataclasses.replace(trained, processes=trained.processes * 2)
    case = _case()
    assert [KnownLosses([record]).beside(case) for record in (failed, in_ranks)] == [
        LossesAlone(None, None, "none on cpu")
    ] * 2
    assert KnownLosses([trained]).beside(case) == LossesAlone((5.0, 4.0), (5.0, 4.0), "none on cpu")
    assert KnownLosses([trained]).beside(dataclasses.replace(case, device="cpu", unspread=None)) is None


def _case() -> Case:
    plugin = Plugin("p")
    return Case("m", "ddp", "train", "2xcpu", plugin, (plugin,), plugin, unspread="none")
