"""Trainings that end in no number, wherever they happen, and logits that are none."""

from __future__ import annotations

import pytest

import membench
from membench.records.record import Record

_SUITE = """\
[suite]
name = "wild"
[matrix]
model = ["trained-tiny"]
technique = ["none", "distill-wildly", "saved+distill-wildly", "fp16+recovered", "overflowing"]
workload = ["forward"]
[technique.distill-wildly]
use = "distill"
steps = 3
learning_rate = 1e30
[technique.recovered]
use = "prune-ffn"
recover_steps = 3
[technique.overflowing]
use = "ends"
how = "overflow"
[settings]
measured_steps = 1
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("wild")
    (folder / "wild.toml").write_text(_SUITE)
    run = membench.run(membench.load_suite(folder / "wild.toml"), output=folder)
    return {record.technique: record for record in run.records}


@pytest.mark.parametrize(
    ("technique", "phase"),
    [("distill-wildly", "apply"), ("fp16+recovered", "apply"), ("saved+distill-wildly", None)],
)
def test_a_training_that_diverges_while_converting_is_a_record_with_that_status_and_all_its_figures(
    records: dict[str, Record], technique: str, phase: str | None
) -> None:
    record = records[technique]
    assert (record.status, record.ended_in) == ("diverged", phase)
    assert (record.message or "").startswith("the loss of training while converting became nan in step ")
    assert record.metrics["bits_per_byte"] is None
    assert (record.metrics["peak_live_bytes"] or 0) > 0
    assert (record.metrics["disk_bytes"] or 0) > 0


def test_logits_that_are_no_numbers_are_said_of_a_case_that_does_not_train(records: dict[str, Record]) -> None:
    record = records["overflowing"]
    assert (record.status, record.remarks) == ("ok", ("the logits of held-out text are not finite",))
    assert record.reasons["bits_per_byte"] == "it is not finite"
