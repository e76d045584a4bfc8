"""Odd values that plug-ins report: each ends its case as failed, by name and field, and the run goes on."""

from __future__ import annotations

import pytest

import membench
from membench.records.record import Record
from membench.records.run_file import read_run

_REFUSED = (
    "nan", "infinite", "huge", "endless", "bool", "text", "list", "negative", "complex", "bytes", "numpy-bool",
    "numpy-nan", "array", "tensor", "object",
)  # fmt: skip
_TAKEN = ("numpy-int", "numpy-float", "good")
_NOT_OF_A_LOSS = ("huge", "endless", "bool", "text", "list", "complex", "bytes", "numpy-bool", "object")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The records of a run with each odd value in each place, by case; the last case is a good one."""
    folder = tmp_path_factory.mktemp("run")
    workloads = [f"{place}-{odd}" for place in ("tokens", "decoded") for odd in (*_REFUSED, *_TAKEN)]
    workloads += [f"loss-{odd}" for odd in (*_NOT_OF_A_LOSS, "tensor", "nan", "numpy-float")]
    facts = [f"fact-{odd}" for odd in (*_REFUSED, *_TAKEN)]
    others = {"unsourced": 'fact = "good"\nsource = "none"', "foreign": 'fact = "good"\nfield = "own.x.lower"'}
    text = f"""\
[suite]
name = "odd"
[matrix]
model = ["small"]
technique = ["none"]
workload = {workloads}
[[include]]
model = "small"
technique = {[*facts, *others]}
workload = "good"
[settings]
threads = 1
measured_steps = 2
[model.small]
use = "block"
mib = 1
[workload.good]
use = "reports"
"""
    for name in workloads:
        place, _, odd = name.partition("-")
        text += f'[workload.{name}]\nuse = "reports"\n{place} = "{odd}"\n'
    for name in facts:
        text += f'[technique.{name}]\nuse = "reports-fact"\nfact = "{name.partition("-")[2]}"\n'
    for name, options in others.items():
        text += f'[technique.{name}]\nuse = "reports-fact"\n{options}\n'
    path = folder / "odd.toml"
    path.write_text(text)
    run = membench.run(membench.load_suite(path), output=folder)
    assert len(read_run(run.path).records) == len(workloads) + len(facts) + len(others) + 1
    return {
        record.case["workload"] if record.technique == "none" else record.technique: record for record in run.records
    }


def _is_failed(record: Record, who: str, field: str) -> None:
    assert record.status == "failed"
    assert record.message is not None
    assert record.message.startswith(f"InvalidValue: {who}: {field}")
    assert record.message.isprintable()
    assert len(record.message) < 300
    # All that was measured besides is kept.
    assert record.metrics["weights_bytes"] == 2**20
    assert record.metrics["step_median_s"]
    assert [phase.name for phase in record.processes[0].phases][-1] == "time"


@pytest.mark.parametrize("odd", _REFUSED)
def test_an_odd_number_of_tokens_is_failed_and_named(records: dict[str, Record], odd: str) -> None:
    _is_failed(records[f"tokens-{odd}"], "workload 'Reports'", "tokens_per_step() = ")
    _is_failed(records[f"decoded-{odd}"], "workload 'Reports'", "decoded_tokens_per_step() = ")


@pytest.mark.parametrize("odd", _REFUSED)
def test_an_odd_fact_is_failed_and_named(records: dict[str, Record], odd: str) -> None:
    if odd != "tensor":
        _is_failed(records[f"fact-{odd}"], f"technique 'fact-{odd}'", "context.facts[accuracy_percent] = ")


def test_facts_without_a_source_or_of_other_plug_ins_are_failed_and_named(records: dict[str, Record]) -> None:
    _is_failed(records["unsourced"], "technique 'unsourced'", "context.facts[accuracy_percent] = [3, null]: ")
    _is_failed(records["foreign"], "technique 'foreign'", "context.facts[own.x.lower] = ")


@pytest.mark.parametrize("odd", _NOT_OF_A_LOSS)
def test_a_loss_that_is_no_number_is_failed_and_named(records: dict[str, Record], odd: str) -> None:
    _is_failed(records[f"loss-{odd}"], "workload 'Reports'", "the loss of a step = ")


def test_a_loss_that_is_not_finite_is_a_divergence(records: dict[str, Record]) -> None:
    assert records["loss-nan"].status == "diverged"


@pytest.mark.parametrize("good", _TAKEN)
def test_numbers_of_numpy_are_taken(records: dict[str, Record], good: str) -> None:
    record = records[f"tokens-{good}"]
    assert (record.status, record.message) == ("ok", None)
    assert record.metrics["tokens_per_s"] == pytest.approx(3 / (record.metrics["step_median_s"] or 0))
    assert records[f"decoded-{good}"].metrics["decode_tokens_per_s"]
    assert records[f"fact-{good}"].metrics["accuracy_percent"] == 3


def test_the_cases_between_and_after_them_are_measured(records: dict[str, Record]) -> None:
    for name in ("loss-tensor", "loss-numpy-float", "good"):
        assert records[name].status == "ok"
        assert records[name].processes[0].losses_nats or name == "good"
