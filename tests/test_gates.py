"""Rules that a suite states about its figures: what they may say, what they come to, what is wrong with others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from membench import load_suite
from membench.errors import RuleError, SuiteError
from membench.records.record import Record
from membench.records.run_file import read_run
from membench.suite.gates import of_table, outcomes, parse

_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
_PAIR = ("llama-60m/none/forward/cpu", "llama-60m/int8-weight-only/forward/cpu")


@pytest.fixture(scope="module")
def records() -> tuple[Record, ...]:
    return read_run(_KEPT).records


def _holds(rule: str, records: tuple[Record, ...]) -> bool | None:
    (outcome,) = outcomes([parse(rule, _PAIR[1])], records)
    return outcome.holds


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        # int8: weights 149.4 MiB, live peak 202.8 MiB, step 171 ms; the reference: 221.5 MiB, 274.7 MiB, 162 ms.
        ("peak_live <= 0.8 * reference", True),
        ("peak_live <= 0.7 * reference", False),
        ("peak_live < 203 MiB", True),
        ("peak_live < 202 MiB", False),
        ("weights + 60 MiB >= peak_live", True),
        ("weights + 50 MiB >= peak_live", False),
        ("reference.weights - weights > 70 MiB", True),
        ("weights / reference <= 2 / 3", False),
        ("weights / reference <= (2 + 0.1) / 3", True),
        ("2 * 3 - 1 * 4 > 1.9", True),
        ("8 / 4 / 2 <= 1", True),
        ("8 - 4 - 2 <= 2", True),
        ("time <= 1.1 * reference", True),
        ("time <= 0.1 s", False),
        ("tokens_per_s >= 0.9 * reference.tokens_per_s", True),
        ("disk/time <= 900 MiB / 1 s", True),
        ("top1_agreement >= 95", False),
        ("1 <= weights / weights", True),
    ],
)
def test_a_rule_is_worked_out_as_it_is_read(rule: str, holds: bool, records: tuple[Record, ...]) -> None:
    assert _holds(rule, records) is holds


def test_a_broken_rule_says_both_sides(records: tuple[Record, ...]) -> None:
    (outcome,) = outcomes([parse("peak_live <= 0.6 * reference", _PAIR[1])], records)
    assert outcome.sentence() == (
        "llama-60m/int8-weight-only/forward/cpu: peak_live <= 0.6 * reference is broken: 202.8 MiB is over 164.8 MiB"
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("peak_live <= 0.6 * refrence", "'refrence': no metric is named 'refrence'; did you mean 'reference'?"),
        ("peek_live <= 1 GiB", "column 1: 'peek_live': no metric is named 'peek_live'; did you mean 'peak_live'?"),
        ("peak_live < 5", "column 11: '<': a size stands on its left and a bare number on its right"),
        ("peak_live <= 2 s", "column 11: '<=': a size stands on its left and a duration on its right"),
        ("peak_live <= 60% * reference", "column 14: '60': write 0.6 for a share of 60%"),
        ("peak_live <= 5 Mb", "column 14: '5': unit 'Mb' is none of B, KiB, MiB, GiB, TiB, µs, ms, s, min and h"),
        ("peak_live + time < 1 GiB", "column 11: '+': a size and a duration do not add up"),
        ("time > 3 ms +", "column 14: the end: expected a number, a metric or 'reference' here"),
        ("(time <= 3 ms", "column 7: '<=': ')' is missing"),
        ("time <= 3 ms 4", "column 14: '4': the rule should end here"),
        ("time 3 ms", "column 6: '3': write <=, <, >= or > here"),
        ("time == 3 ms", "column 6: '=' has no place in a rule"),
        ("1 <= reference", "of which metric? the rule names none; write reference.peak_live, say"),
        ("weights.peak <= 2", "column 1: 'weights.peak': only 'reference' has figures of its own: reference.peak"),
        ("__import__('os').system('true') <= 1", "column 1: '_' has no place in a rule"),
        ("", "column 1: the end: expected a number, a metric or 'reference' here"),
        ("(" * 30 + "1", "column 21: '(': more than 20 brackets within each other"),
    ],
)  # fmt: skip
def test_a_rule_that_is_wrong_is_told_with_the_column(rule: str, message: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse(rule)
    assert str(raised.value).endswith(message)


def test_a_rule_is_held_against_every_case_it_is_about_and_not_the_reference_against_itself(
    records: tuple[Record, ...],
) -> None:
    held = outcomes([parse("bits_per_byte <= 1.01 * reference")], records)
    # Of the models only one is trained.
    assert {outcome.case_id.split("/")[0] for outcome in held} == {"trained-tiny"}
    assert "none" not in {outcome.case_id.split("/")[1] for outcome in held}
    assert all(outcome.holds for outcome in held)
    without = outcomes([parse("weights <= 1 GiB")], records)
    assert len(without) == len({record.id for record in records})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"status": "crashed"}, "the case ended as crashed"),
        ({"metrics": {"peak_live_bytes": None}, "reasons": {"peak_live_bytes": "no glibc"}},
         "peak_live of the case is not known: no glibc"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_held_against_anything_says_why(
    changed: dict[str, object], reason: str, records: tuple[Record, ...]
) -> None:
    reference, case = (next(record for record in records if record.id == name) for name in _PAIR)
    rule = parse("peak_live <= 0.6 * reference", _PAIR[1])
    (outcome,) = outcomes([rule], [reference, dataclasses.replace(case, **changed)])  # type: ignore[arg-type]
    assert (outcome.holds, outcome.reason) == (None, reason)
    (outcome,) = outcomes([rule], [case])
    assert (outcome.holds, outcome.reason) == (None, "the reference was not measured")


def test_a_rule_about_figures_that_no_case_has_does_not_look_kept(records: tuple[Record, ...]) -> None:
    (outcome,) = outcomes([parse("accuracy >= 90")], records)
    assert outcome.sentence() == "*: accuracy >= 90 was not checked: no case here has these figures"


def test_a_rule_against_the_reference_says_so_where_there_is_nothing_else(records: tuple[Record, ...]) -> None:
    alone = [record for record in records if record.id == _PAIR[0]]
    (outcome,) = outcomes([parse("peak_live <= 0.6 * reference")], alone)
    assert (outcome.holds, outcome.reason) == (None, "only references are here, and nothing to hold against them")


def test_of_repeats_the_median_counts(records: tuple[Record, ...]) -> None:
    reference, case = (next(record for record in records if record.id == name) for name in _PAIR)
    outlier = dataclasses.replace(case, repeat=1, metrics={**case.metrics, "peak_live_bytes": 10**12})
    again = dataclasses.replace(case, repeat=2)
    assert _holds("peak_live <= 0.8 * reference", (reference, case, outlier, again)) is True


_SUITE = """\
[suite]
name = "gated"
[matrix]
model = ["ballast"]
technique = ["none", "bf16"]
workload = ["burst"]
"""


def test_a_suite_states_tolerances_and_gates_for_all_cases_and_for_some(tmp_path: Path) -> None:
    path = tmp_path / "gated.toml"
    path.write_text(
        _SUITE + '[regression]\npeak_live = "2%"\ntime = "off"\n[[regression.case]]\nmatch = "*/bf16/*"\n'
        'weights = ["1%", "1 MiB"]\n'
        '[gate]\nrules = ["weights <= 64 MiB"]\n[[gate.case]]\nmatch = "*/bf16/*"\n'
        'rules = ["weights <= 0.5 * reference"]\n'
    )
    suite = load_suite(path)
    assert [str(one) for one in suite.tolerances] == [
        "peak_live:2%", "time:off", "*/bf16/*:weights:1%", "*/bf16/*:weights:1.000 MiB",
    ]  # fmt: skip
    assert [(gate.text, gate.match) for gate in suite.gates] == [
        ("weights <= 64 MiB", "*"), ("weights <= 0.5 * reference", "*/bf16/*"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[regression]\npeek_live = "2%"', "regression.peek_live = '2%': no metric is named 'peek_live';"
         " did you mean 'peak_live'?"),
        ('[regression]\npeak_live = "2 Mb"', "regression.peak_live = '2 Mb': write a share such as '2%', or a size in"
         " B, KiB, MiB, GiB or TiB, such as '2 GiB', or 'off'"),
        ('[[regression.case]]\npeak_live = "2%"', "regression.case.0.match: expected a pattern over case ids, such as"
         " 'llama-*/train/*'"),
        ('[[regression.case]]\nmatch = "lama*"\ntime = "2%"', "regression.case: match = 'lama*' fits no case of the"
         " suite; known: ballast/bf16/burst/cpu, ballast/none/burst/cpu"),
        ('[gate]\nrule = ["a"]', "unknown key 'gate.rule'; did you mean 'rules'?"),
        ('[gate]\nrules = "weights < 1 GiB"', "gate.rules = 'weights < 1 GiB': expected a list of rules:"
         " ['peak_live <= 0.6 * reference']"),
        ('[gate]\nrules = ["weights << 1"]', "gate.rules.0: rule 'weights << 1', column 10: '<': expected a number, a"
         " metric or 'reference' here"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_suite_is_one_line_with_key_and_value(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gated.toml"
    path.write_text(_SUITE + text)
    with pytest.raises(SuiteError) as raised:
        load_suite(path)
    assert str(raised.value) == f"{path}: {message}"


def test_a_table_of_gates_is_no_place_for_anything_else() -> None:
    with pytest.raises(RuleError, match=r"unknown key 'gate.case.0.rule'; did you mean 'rules'\?"):
        of_table({"case": [{"match": "*", "rule": []}]})


def test_a_rule_that_comes_to_more_than_a_number_holds_says_so(records: tuple[Record, ...]) -> None:
    huge = "*".join(["disk/1 B"] * 40)
    (outcome,) = outcomes([parse(f"{huge} <= 1", _PAIR[1])], records)
    assert (outcome.holds, outcome.reason) == (None, "it comes to more than a number holds")
