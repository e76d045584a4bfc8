"""Advice for a budget, from records of known figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from membench.records.record import Record
from membench.report.advice import Advice, advise, lines
from tests import made_up

from .made_up import MIB, record


def _case(technique: str, mib: float, lost: float | None = None, seconds: float = 1.0, **more: Any) -> Record:
    """A case of a known footprint, with 2 bits a byte less what is lost."""
    metrics = {
        "peak_live_bytes": mib * MIB / 2,
        "peak_footprint_bytes": mib * MIB,
        "step_median_s": seconds,
        "bits_per_byte": 2.0,
        "lost_bits_per_byte": lost,
        "lost_bits_per_byte_standard_error": 0.001,
    }
    return record(technique, **(metrics | more))


def _advised(records: list[Record], budget_mib: int, most_loss_percent: float | None = None) -> Advice:
    (advice,) = advise(records, budget_mib * MIB, most_loss_percent)
    return advice


_MEASURED = [
    _case("none", 100),
    _case("half", 50, 0.0001),
    _case("quarter", 25, 0.02),
    _case("eighth", 12, 0.5),
    _case("slow", 40, 0.0001, seconds=3.0),
]


@pytest.mark.parametrize(
    ("budget_mib", "best"), [(200, "half"), (60, "half"), (45, "slow"), (30, "quarter"), (12, "eighth")]
)
def test_what_fits_and_loses_least_is_advised(budget_mib: int, best: str) -> None:
    assert _advised(_MEASURED, budget_mib).technique == best


def test_each_of_the_others_has_its_reason() -> None:
    advice = _advised(_MEASURED, 60)
    assert advice.why == "needs 50.00 MiB at its footprint peak, leaves 10.00 MiB; loses no bits per byte beyond chance"
    assert dict(advice.others) == {
        "none": "needs 100.0 MiB at its footprint peak, 40.00 MiB too much",
        "quarter": "fits (25.00 MiB at its footprint peak), but loses 1.0% (+0.0200 ±0.0010 bits/byte)",
        "eighth": "fits (12.00 MiB at its footprint peak), but loses 25% (+0.5000 ±0.0010 bits/byte)",
        "slow": "fits (40.00 MiB at its footprint peak) and loses as little, but takes 3.00 s a step, not 1.00 s",
    }
    assert dict(_advised(_MEASURED, 200).others)["none"] == (
        "fits and loses as little in about the same time, but needs 100.0 MiB at its footprint peak"
    )


def test_nothing_is_advised_that_loses_more_than_may_be_lost() -> None:
    advice = _advised(_MEASURED, 30, most_loss_percent=0.5)
    assert advice.technique is None
    assert advice.why == "no measured stack fits 30.00 MiB and is known to lose no more than 0.5%"
    assert dict(advice.others)["quarter"] == "fits, but loses 1.0% (+0.0200 ±0.0010 bits/byte), more than 0.5%"
    assert _advised(_MEASURED, 30, most_loss_percent=1.2).technique == "quarter"
    slightly = _case("slightly", 25, 0.02008, lost_bits_per_byte_standard_error=0.001)
    assert dict(_advised([_MEASURED[0], slightly], 30, most_loss_percent=1.0).others)["slightly"] == (
        "fits, but loses 1.0% (+0.0201 ±0.0010 bits/byte): 1.004% is more than 1%"
    )


@pytest.mark.parametrize(
    ("lost", "error", "told"),
    [
        (0.018, 0.002, "fits, but loses 0.9% (+0.0180 ±0.0020 bits/byte): too near to tell, it may be 1.1%"),
        (0.010, 0.006, "fits, but loses no bits per byte beyond chance: too near to tell, it may be 1.1%"),
    ],
)
def test_nor_what_chance_may_have_lose_more(lost: float, error: float, told: str) -> None:
    near = _case("near", 25, lost, lost_bits_per_byte_standard_error=error)
    assert dict(_advised([_MEASURED[0], near], 30, most_loss_percent=1.0).others)["near"] == told
    assert _advised([_MEASURED[0], near], 30, most_loss_percent=1.2).technique == "near"


def test_converting_that_does_not_fit_rules_out_what_would_run() -> None:
    costly = _case("costly", 20, 0.0, apply_peak_live_bytes=90 * MIB)
    assert dict(_advised([_MEASURED[0], costly], 60).others)["costly"] == (
        "needs 90.00 MiB at its apply peak, 30.00 MiB too much"
    )


def _seen(how: Mapping[str, Any]) -> Advice:
    none = _case("none", 100)
    other = dataclasses.replace(_case("a", 50, 0.0), obtained={"peak_footprint_bytes": how})
    return _advised([none, other], 60)


def test_a_figure_that_is_a_bound_is_held_against_the_budget_as_one() -> None:
    assert _seen({"bound": "at least"}).why.startswith("needs 50.00 MiB or more, as far as samples saw")
    maybe = _seen({"bound": "at least", "at_most_bytes": 70 * MIB})
    assert (
        dict(maybe.others)["a"] == "needs 50.00 MiB to 70.00 MiB at its footprint peak: whether that fits is not known"
    )
    near = _seen({"bound": "exact", "resolution_bytes": 11 * MIB})
    assert dict(near.others)["a"] == (
        "needs 50.00 MiB at its footprint peak: too near to tell, the figure is good to 11.00 MiB"
    )


def test_what_is_left_of_the_budget_is_told_as_the_bound_that_it_is() -> None:
    assert "leaves 10.00 MiB at most" in _seen({"bound": "at least"}).why
    within = {"bound": "at least", "at_most_bytes": 55 * MIB}
    assert "needs 50.00 MiB to 55.00 MiB at its footprint peak, leaves 5.000 MiB at least" in _seen(within).why
    # Live memory surely takes 25 MiB, whatever bound the footprint has.
    assert "needs 25.00 MiB to 50.00 MiB" in _seen({"bound": "at most", "at_least_bytes": 0}).why
    bound = {"bound": "at most"}
    nothing_sure = dataclasses.replace(
        _case("a", 50, 0.0), obtained={"peak_footprint_bytes": bound, "peak_live_bytes": bound}
    )
    assert "needs 50.00 MiB at most at its footprint peak, leaves 10.00 MiB at least" in (
        _advised([_case("none", 100), nothing_sure], 60).why
    )


def test_every_repeat_has_to_find_room() -> None:
    repeats = [dataclasses.replace(_case("a", mib, 0.0), repeat=number) for number, mib in enumerate((40, 41, 70))]
    advice = _advised([_MEASURED[0], *repeats], 60)
    assert dict(advice.others)["a"] == "needs 70.00 MiB at its footprint peak, 10.00 MiB too much"
    lacking = dataclasses.replace(repeats[2], metrics={}, reasons={"peak_footprint_bytes": "the driver hides it"})
    advice = _advised([_MEASURED[0], *repeats[:2], lacking], 60)
    assert dict(advice.others)["a"] == "its footprint peak is not known: the driver hides it"


def _unread(technique: str, mib: float, kl: float | None) -> Record:
    """A case of which only the divergence is known."""
    return _case(technique, mib, bits_per_byte=None, kl_nats=kl)


def test_a_loss_in_percent_a_divergence_and_nothing_known_are_not_held_against_each_other() -> None:
    # 25% of the bits are more than 0.1 nats by the figure alone, and are at least known.
    known, diverging, unknown = _case("known", 10, 0.5), _unread("diverging", 10, 0.1), _unread("unknown", 10, None)
    assert _advised([_MEASURED[0], unknown, diverging, known], 60).technique == "known"
    advice = _advised([_MEASURED[0], unknown, diverging], 60)
    assert advice.technique == "diverging"
    assert dict(advice.others)["unknown"] == "fits (10.00 MiB at its footprint peak), but its quality is not known"


def test_logits_that_are_the_references_lose_nothing() -> None:
    advice = _advised([_MEASURED[0], _unread("same", 50, 1e-7)], 60, most_loss_percent=0.1)
    assert advice.technique == "same"
    assert advice.why.endswith("its logits are within 1.0e-06 nats a token of the reference's")


def test_losses_that_chance_may_tell_apart_are_the_same() -> None:
    first, second = _case("first", 50, 0.1000), _case("second", 20, 0.1015)
    assert _advised([_MEASURED[0], first, second], 60).technique == "second"
    second = _case("second", 20, 0.1025)
    assert _advised([_MEASURED[0], first, second], 60).technique == "first"


def test_what_reads_less_is_no_faster_for_having_less_to_read() -> None:
    records = [
        _case("none", 100, read_mb_per_s=1.0, tokens_per_s=1e6),
        _case("small", 50, read_mb_per_s=1.0, tokens_per_s=1e6),
        _case("tiny-steps", 20, seconds=0.1, read_mb_per_s=1.0, tokens_per_s=5e5),
    ]
    advice = _advised(records, 200)
    assert advice.technique == "small"
    assert dict(advice.others)["tiny-steps"] == (
        "fits (20.00 MiB at its footprint peak) and loses as little, but does 500000 tokens/s, not 1000000"
    )


def test_what_is_not_known_is_said_and_never_advised() -> None:
    unknown = dataclasses.replace(
        _case("a", 50), metrics={"peak_footprint_bytes": None}, reasons={"peak_footprint_bytes": "the driver hides it"}
    )
    failed = dataclasses.replace(_case("b", 1), status="out-of-memory", ended_in="load", message="it wanted 9 GiB")
    untrained = _case("c", 50, bits_per_byte=None, kl_nats=0.1)
    others = dict(_advised([_MEASURED[0], unknown, failed, untrained], 60, most_loss_percent=1.0).others)
    assert others["a"] == "its footprint peak is not known: the driver hides it"
    assert others["b"] == "out-of-memory in load: it wanted 9 GiB"
    assert others["c"] == "fits, but what quality it loses is not known (KL 1.0e-01 from the reference)"


def test_accuracy_is_lost_in_percentage_points() -> None:
    records = [record(name, peak_live_bytes=mib * MIB, peak_footprint_bytes=mib * MIB, step_median_s=1.0,
                      accuracy_percent=percent)
               for name, mib, percent in (("none", 100, 97.0), ("small", 10, 95.5))]  # fmt: skip
    assert _advised(records, 50, most_loss_percent=2.0).why.endswith("loses 1.5 percentage points of accuracy")
    assert _advised(records, 50, most_loss_percent=1.0).technique is None


def test_the_text_says_what_is_held_against_the_budget_and_what_comes_on_top() -> None:
    process = {"baseline": {"anonymous_bytes": 200 * MIB, "file_bytes": 100 * MIB}}
    records = [dataclasses.replace(_MEASURED[0], processes=(made_up.process(**process),))]
    said = list(lines(records, advise(records, 200 * MIB)))
    assert said[:2] == [
        "m · forward · cpu",
        "  none: needs 100.0 MiB at its footprint peak, leaves 100.0 MiB; it is the reference, and loses nothing",
    ]
    assert said[-1] == (
        "Held against the budget is the highest of the footprint peak and the live peaks of loading, converting,"
        " packing data, the first step and running. What the interpreter and its libraries take comes on top: up to"
        " 300.0 MiB in this run."
    )


def test_of_a_gpu_it_says_whose_memory_is_meant_and_nothing_of_the_interpreters() -> None:
    on_gpu = dataclasses.replace(_MEASURED[0], case={**_MEASURED[0].case, "device": "cuda:0"})
    said = list(lines([on_gpu], advise([on_gpu], 200 * MIB)))[-1]
    assert said.endswith("Of cases on a GPU it is the GPU's own memory, the CUDA context in the footprint.")
    assert "interpreter" not in said
    assert "GPU" not in list(lines(_MEASURED, advise(_MEASURED, 200 * MIB)))[-1]


def test_of_a_program_its_footprint_is_all_that_it_needs() -> None:
    made = record("none", peak_live_bytes=None, peak_footprint_bytes=71 * MIB, step_median_s=1.0)
    program = dataclasses.replace(made, processes=(made_up.process(role="script"),))
    assert _advised([program], 70).technique is None
    given = advise([program], 100 * MIB)
    assert given[0].why.startswith("needs 71.00 MiB at its footprint peak, leaves 29.00 MiB;")
    said = list(lines([program], given))[-1]
    assert said.endswith(" Of a program its interpreter and libraries are in it.")


def test_where_data_are_only_read_nothing_is_learnt_and_what_is_left_out_is_lost() -> None:
    read = {"read_mb_per_s": 100.0, "lost_bits_per_byte": 0.0, "bits_per_byte": 2.0}
    records = [
        _case("none", 100, **read),
        _case("quarter-of-it", 10, seconds=0.2, corpus_kept_percent=25.0, **read),
        _case("packed", 20, **read),
    ]
    advice = _advised(records, 200)
    assert advice.technique == "packed"
    assert "leaves out 75% of the text" in dict(advice.others)["quarter-of-it"]
