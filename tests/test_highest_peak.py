"""The peak that decides what fits: one figure for tables, the front, advice, limits and pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from membench.protocol.case import REFERENCE
from membench.records.comparison import Comparison
from membench.records.highest_peak import HIGHEST, highest_live_peak
from membench.records.record import Record
from membench.report import pareto, savings, summary, text
from membench.report.advice import advise
from membench.running.derived_metrics import DerivedMetrics
from membench.running.runner import limits_kept_while_running
from tests.made_up import MIB, record

_GROUP = ("m", "train", "cpu")


def _case(technique: str, step_s: float, *, obtained: dict[str, Any] | None = None, **peaks_mib: float) -> Record:
    metrics = {f"{name}_bytes": value * MIB for name, value in peaks_mib.items()}
    known: dict[str, Any] = {**metrics, "step_median_s": step_s, "kl_nats": 0.0}
    return record(technique, "train", obtained=obtained, **known)


# As measured of llama-15m: the first step's compilers are sampled, and may have taken 532 MiB.
_COMPILERS = {"warmup_peak_live_bytes": {"bound": "at least", "at_most_bytes": 532 * MIB, "children": True}}
_NONE = _case(
    REFERENCE, 0.28, peak_live=313.1, load_peak_live=93.0, apply_peak_live=58.1, warmup_peak_live=311.9,
    peak_footprint=526.0,
)  # fmt: skip
_8BIT = _case(
    "adamw-8bit", 0.53, peak_live=234.3, load_peak_live=93.0, apply_peak_live=58.1, warmup_peak_live=452.2,
    peak_footprint=443.3, obtained=_COMPILERS,
)  # fmt: skip
_RECORDS = [_NONE, _8BIT]


@pytest.mark.parametrize(
    ("peaks", "obtained", "value_mib", "how"),
    [
        ({"load": 90, "run": 100}, {}, 100, {"bound": "exact"}),
        ({"load": 190, "apply": 60, "run": 100, "warmup": 101}, {}, 190, {"bound": "exact"}),
        # Another phase may have taken more than the one that surely took the most.
        ({"warmup": 80, "run": 100}, {"warmup": {"bound": "at least", "at_most_bytes": 120 * MIB}}, 100,
         {"bound": "at least", "at_most_bytes": 120 * MIB}),
        ({"warmup": 80, "run": 100}, {"warmup": {"bound": "at least"}}, 100, {"bound": "at least"}),
        ({"load": 150, "run": 100}, {"load": {"bound": "at most", "at_least_bytes": 0}}, 150,
         {"bound": "at most", "at_least_bytes": 100 * MIB}),
        ({"load": 90, "run": 100}, {"load": {"bound": "at most", "at_least_bytes": 0}}, 100, {"bound": "exact"}),
    ],
)  # fmt: skip
def test_it_is_the_highest_of_the_phases_with_what_all_their_bounds_say(
    peaks: dict[str, int], obtained: dict[str, Any], value_mib: int, how: dict[str, Any]
) -> None:
    def field(phase: str) -> str:
        return "peak_live_bytes" if phase == "run" else f"{phase}_peak_live_bytes"

    peak = highest_live_peak(
        {field(phase): size * MIB for phase, size in peaks.items()},
        {field(phase): known for phase, known in obtained.items()},
    )
    assert peak is not None
    assert peak.value == value_mib * MIB
    assert {name: told for name, told in peak.obtained().items() if name != "source"} == how


def test_it_is_not_known_without_the_peak_of_running() -> None:
    assert highest_live_peak({"load_peak_live_bytes": 1.0, "apply_peak_live_bytes": 2.0}, {}) is None
    assert highest_live_peak({"peak_live_bytes": 1.0}, {}) is None


def test_earlier_records_get_it_when_they_are_compared() -> None:
    found = Comparison(_RECORDS)
    assert found.value(_GROUP, "adamw-8bit", HIGHEST) == pytest.approx(452.2 * MIB)
    assert found.ratio(_GROUP, "adamw-8bit", HIGHEST) == pytest.approx(452.2 / 313.1)


def test_the_table_shows_the_phase_that_decides_and_which_peak_the_front_is_of() -> None:
    header, _, none, eight = text.comparison(_RECORDS).splitlines()[2:]
    assert "warm-up peak" in header
    assert none.rstrip().endswith("●")
    assert "≥452.2 MiB ≥×1.45" in eight
    assert eight.rstrip().endswith("○")
    assert text.remarks(_RECORDS) == [
        "m/adamw-8bit/train/cpu: the first step takes 452.2 MiB of live memory, more than running the original"
        " (313.1 MiB)",
        "m · train · cpu: ● is on the Pareto front by the highest peak of all phases, ○ only by the live peak while"
        " running",
    ]


def test_a_warm_up_that_decides_nothing_has_no_column_and_no_mark_of_its_own() -> None:
    warm = dataclasses.replace(_8BIT, metrics={**_8BIT.metrics, "warmup_peak_live_bytes": 236 * MIB}, obtained={})
    table = text.comparison([_NONE, warm])
    assert "warm-up" not in table
    assert table.count("●") == 2
    assert text.remarks([_NONE, warm]) == []


def test_the_line_on_what_it_saved_and_cost_has_both_peaks() -> None:
    (line,) = savings.verdicts(_RECORDS)
    assert line.startswith("adamw-8bit: saved live peak ×0.75, footprint peak ×0.84; cost ")
    assert "warm-up peak ×1.45" in line


def test_advice_holds_the_highest_peak_against_the_budget() -> None:
    (advice,) = advise(_RECORDS, 450 * MIB)
    assert advice.technique is None
    assert dict(advice.others)["adamw-8bit"] == "needs 452.2 MiB to 532.0 MiB at its warm-up peak, 2.200 MiB too much"
    (advice,) = advise(_RECORDS, 532 * MIB)
    assert advice.technique == "none"


def test_a_limit_on_running_that_another_phase_exceeds_is_said() -> None:
    found = DerivedMetrics(dict(_8BIT.metrics), {}, {name: dict(how) for name, how in _COMPILERS.items()})
    assert limits_kept_while_running(found, {"peak_live_bytes": 300 * MIB}) == [
        "peak_live is within its limit of 300.0 MiB while running, but the case needs 452.2 MiB to 532.0 MiB at its"
        " warm-up peak; a limit on highest_peak_live is one on all phases"
    ]
    assert limits_kept_while_running(found, {"peak_live_bytes": 500 * MIB}) == []
    assert limits_kept_while_running(found, {"peak_live_bytes": 200 * MIB}) == []  # broken, which is said by itself


def test_pictures_and_sentences_say_of_which_peak_they_speak() -> None:
    found = Comparison(_RECORDS)
    caption = pareto.pareto(found, _GROUP).caption
    assert (
        "All this is of the live peak while running. Before that, more is needed than the reference ever takes:"
        in caption
    )
    assert "Filled: on the front by the live peak while running (none, adamw-8bit)." in caption
    assert "adamw-8bit (452.2 MiB to 532.0 MiB at its warm-up peak)." in caption
    assert "By the highest peak of all phases the front is: none." in caption
    assert "while running, but needs 452.2 MiB to 532.0 MiB at its warm-up peak" in summary.sentence(
        found, _GROUP, "adamw-8bit"
    )
