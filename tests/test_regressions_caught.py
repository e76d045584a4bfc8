"""Growth of known amounts, in real runs: each is caught and laid at the right door; the same again is no alarm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

import membench
from membench.records.record import Record
from membench.regression.judging import judge
from membench.regression.measured import Measured, of_records
from membench.regression.verdict import Change, Judgement
from membench.suite.tolerances import Tolerances

MIB = 2**20

# Weights of the net: 4 layers of 1 MiB, embedding and head of 0.5 MiB each. Their states are twice as much.
_THREE_PERCENT = {"weights": 0.03 * 5 * MIB, "optimizer": 0.03 * 10 * MIB, "activations": 0.03 * 2.5 * MIB}

_LOADED = 96 * MIB

_MEMORY = """\
[suite]
name = "growing"
[matrix]
model = ["net"]
technique = ["before", "again", "weights", "optimizer", "activations"]
workload = ["train"]
[model.large]
use = "block"
mib = 96
[workload.short]
use = "known-burst"
mib = 1
[[include]]
model = "large"
technique = ["before", "again", "load"]
workload = "short"
[settings]
threads = 1
measured_steps = 2
"""

_TIME = """\
[suite]
name = "slow"
[matrix]
model = ["small"]
technique = ["before", "slower"]
workload = ["train"]
[model.small]
use = "net"
width = 16
[settings]
threads = 1
repeats = 3
measured_steps = 4
"""


def _variant(name: str, what: str, more: str = "") -> str:
    return f'[technique.{name}]\nuse = "grows"\nwhat = "{what}"\n{more}\n'


def _records(folder: Path, name: str, text: str) -> tuple[Record, ...]:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return membench.run(membench.load_suite(path), output=folder).records


def _as_one_case(records: Sequence[Record], technique: str) -> Measured:
    """What was measured with a technique, as if it were that of another one: two states of one case."""
    chosen = [record for record in records if record.technique == technique]
    return of_records(
        [dataclasses.replace(record, id=record.id.replace(technique, "x")) for record in chosen], technique
    )


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judgement]:
    """A technique's figures against those of before."""
    more = {**_THREE_PERCENT, "load": 0.03 * _LOADED}
    variants = [_variant(name, "nothing") for name in ("before", "again")]
    variants += [_variant(what, what, f"more_bytes = {int(size)}") for what, size in more.items()]
    records = _records(tmp_path_factory.mktemp("growing"), "growing", _MEMORY + "".join(variants))
    before = _as_one_case(records, "before")

    def judged(technique: str) -> Judgement:
        now = _as_one_case(records, technique)
        cases = {case_id: case for case_id, case in before.cases.items() if case_id in now.cases}
        return judge(dataclasses.replace(before, cases=cases), now, Tolerances())

    return judged


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Measured]:
    """Steps that pause for 100 ms, and for a fifth more."""
    pauses_s = {"before": 0.100, "slower": 0.120}
    variants = [_variant(name, "time", f"pause_s = {pause_s}") for name, pause_s in pauses_s.items()]
    records = _records(tmp_path_factory.mktemp("slow"), "slow", _TIME + "".join(variants))
    return {name: _as_one_case(records, name) for name in pauses_s}


Grown = Callable[[str], Judgement]


def _regressed(judgement: Judgement) -> dict[str, Change]:
    return {change.metric.name: change for change in judgement.regressions}


def test_runs_of_the_same_raise_no_alarm(grown: Grown) -> None:
    again = grown("again")
    assert [change.sentence() for change in (*again.regressions, *again.not_judged)] == []
    assert again.exit_code == 0


def test_growth_of_weights_is_caught_and_the_module_named(grown: Grown) -> None:
    judgement = grown("weights")
    assert judgement.exit_code == 1
    change = _regressed(judgement)["weights"]
    assert change.ratio == pytest.approx(1.03, abs=0.001)
    (cause,) = change.causes
    assert (cause.what, cause.kind) == ("1.2", "modules")
    assert cause.amount == pytest.approx(_THREE_PERCENT["weights"], abs=4)


def test_growth_of_optimizer_state_is_caught_and_nothing_else_accused(grown: Grown) -> None:
    found = _regressed(grown("optimizer"))
    assert set(found) == {"optimizer_state"}
    assert found["optimizer_state"].ratio == pytest.approx(1.03, abs=0.001)
    (cause,) = found["optimizer_state"].causes
    assert (cause.what, cause.phase) == ("optimizer", "run")
    assert cause.amount == pytest.approx(_THREE_PERCENT["optimizer"], abs=4)


def test_growth_of_an_activation_is_caught_in_the_forward_pass_that_keeps_it(grown: Grown) -> None:
    found = _regressed(grown("activations"))
    assert set(found) == {"activations"}
    (cause,) = found["activations"].causes
    assert (cause.what, cause.phase, cause.part) == ("activations", "run", "forward")
    assert cause.amount == pytest.approx(_THREE_PERCENT["activations"], abs=4)


def test_growth_of_the_peak_of_loading_is_caught_as_taken_only_meanwhile(grown: Grown) -> None:
    found = _regressed(grown("load"))
    assert set(found) == {"load_peak_live"}
    (cause,) = found["load_peak_live"].causes
    assert (cause.what, cause.phase) == ("meanwhile", "load")
    assert cause.amount == pytest.approx(0.03 * _LOADED, abs=MIB / 2)


def test_a_regression_is_told_in_one_line_with_amount_and_place(grown: Grown) -> None:
    assert _regressed(grown("optimizer"))["optimizer_state"].sentence() == (
        "net/x/train/cpu: optimizer_state 10.00 MiB → 10.30 MiB (+3.0%, tolerance 1%):"
        " +307.2 KiB optimizer state (phase run, part optimizer)"
    )


def test_a_slowdown_is_caught_with_its_interval_and_the_part_of_the_step(paced: Mapping[str, Measured]) -> None:
    (change,) = judge(paced["before"], paced["slower"], Tolerances()).regressions
    assert change.metric.name == "time"
    assert change.ratio == pytest.approx(1.2, abs=0.05)
    assert change.ratio is not None
    assert change.interval is not None
    assert change.p_value is not None
    assert 1 < change.interval[0] <= change.ratio <= change.interval[1]
    assert change.p_value == pytest.approx(1 / 20)  # of three and three none can be lower
    assert [(cause.what, cause.kind) for cause in change.causes] == [("optimizer", "part of the step")]


def test_what_got_better_is_told_and_fails_nothing(paced: Mapping[str, Measured]) -> None:
    judgement = judge(paced["slower"], paced["before"], Tolerances())
    assert [change.metric.name for change in judgement.better] == ["time"]
    assert judgement.exit_code == 0
