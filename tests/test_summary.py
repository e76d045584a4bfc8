"""A run in plain words, computed from records of known figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from membench.records.comparison import Comparison
from membench.report import summary

from .made_up import GIB, MIB, record, run

_GROUP = ("m", "forward", "cpu")


def _said(**metrics: Any) -> str:
    """What is said of a technique beside a reference of 100 MiB, a second and 2 bits a byte."""
    none = record("none", peak_live_bytes=100 * MIB, step_median_s=1.0, bits_per_byte=2.0)
    other = record("a", **({"peak_live_bytes": 100 * MIB, "step_median_s": 1.0} | metrics))
    return summary.sentence(Comparison([none, other]), _GROUP, "a")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (
            {"peak_live_bytes": 34.5 * MIB, "lost_bits_per_byte": 0.006, "lost_bits_per_byte_standard_error": 0.001},
            "holds 2.9 times less live memory at its peak (34.50 MiB, not 100.0 MiB) for 0.3% more bits per byte,"
            " in about the same time.",
        ),
        (
            {"peak_live_bytes": 94 * MIB, "lost_bits_per_byte": 0.006, "lost_bits_per_byte_standard_error": 0.004},
            "holds 6% less live memory at its peak (94.00 MiB, not 100.0 MiB) for no more bits per byte than chance"
            " explains, in about the same time.",
        ),
        (
            {"peak_live_bytes": 250 * MIB, "step_median_s": 0.5, "kl_nats": 0.001},
            "holds 2.5 times as much live memory at its peak (250.0 MiB, not 100.0 MiB), its logits 1.0e-03 nats a"
            " token from the reference's, in 0.5 times the time.",
        ),
        # In a training a gain is chance: the standard error is of the text, not of the training.
        (
            {"lost_bits_per_byte": -0.1, "lost_bits_per_byte_standard_error": 0.01, "final_loss_nats": 1.0},
            "holds as much live memory at its peak for no more bits per byte than chance explains, in about the same"
            " time.",
        ),
        ({"peak_live_bytes": None}, "holds an amount of memory that is not known, in about the same time."),
    ],
)
def test_a_sentence_tells_what_is_held_lost_and_taken(metrics: dict[str, Any], said: str) -> None:
    assert _said(**metrics) == said


@pytest.mark.parametrize(
    ("bound", "mib", "said"),
    [
        ("at most", 50, "at least 2.0 times less"),
        ("at least", 50, "an amount of live memory at its peak of which only a bound is known"),
        ("at least", 200, "at least 2.0 times as much"),
    ],
)
def test_a_bound_is_told_as_one(bound: str, mib: int, said: str) -> None:
    assert said in _said(peak_live_bytes=mib * MIB, obtained={"peak_live_bytes": {"bound": bound}})


def test_a_figure_near_its_sources_granularity_is_told_as_approximate() -> None:
    how = {"peak_live_bytes": {"resolution_bytes": 10 * MIB}}
    assert "about 2.0 times less" in _said(peak_live_bytes=50 * MIB, obtained=how)


def test_of_each_group_the_least_without_a_loss_and_the_least_at_all_are_named() -> None:
    def made(technique: str, mib: int, lost: float | None, seconds: float = 1.0) -> Any:
        return record(technique, peak_live_bytes=mib * MIB, step_median_s=seconds, bits_per_byte=2.0,
                      lost_bits_per_byte=lost, lost_bits_per_byte_standard_error=0.001)  # fmt: skip

    records = [
        made("none", 100, None), made("free", 60, 0.0005), made("nearly-free", 59, 0.0005, 9.0), made("least", 20, 0.5),
        made("larger", 150, 0.0), dataclasses.replace(made("failed", 1, 0.0), status="failed"),
    ]  # fmt: skip
    # Of two that are as small, the faster.
    assert [(line.group, line.technique) for line in summary.highlights(records)] == [
        (_GROUP, "free"),
        (_GROUP, "least"),
    ]


def test_what_has_nothing_to_compare_with_is_said() -> None:
    failed = dataclasses.replace(record("none", peak_live_bytes=None), status="failed")
    told = "m · forward · cpu: nothing to compare with: 'none' was not measured to its end."
    assert [str(line) for line in summary.highlights([failed, record("a", peak_live_bytes=MIB)])] == [told]
    same = [record(name, peak_live_bytes=MIB) for name in ("none", "a")]
    told = "m · forward · cpu: no technique lowers the live peak by more than runs of a case differ."
    assert [str(line) for line in summary.highlights(same)] == [told]


@pytest.mark.parametrize(
    ("of_reference", "of_technique"), [({"bound": "at most"}, {}), ({"bound": "at most"}, {"bound": "at most"})]
)
def test_where_bounds_leave_open_which_is_smaller_no_technique_is_said_not_to_be(
    of_reference: dict[str, str], of_technique: dict[str, str]
) -> None:
    records = [
        record(name, peak_live_bytes=mib * MIB, obtained={"peak_live_bytes": how})
        for name, mib, how in (("none", 100, of_reference), ("a", 50, of_technique))
    ]
    (line,) = summary.highlights(records)
    assert line.text == "no technique surely lowers the live peak by more than runs of a case differ."


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"kl_nats": 2e-7}, ", its logits within 1.0e-06 nats a token of the reference's,"),
        ({"accuracy_percent": 90.4}, ", gets as many of the held-out samples right to within 0.5 percentage points,"),
        ({"accuracy_percent": 88.5}, ", gets 1.5 percentage points fewer of the held-out samples right,"),
    ],
)
def test_what_cannot_be_told_apart_is_not_said_to_be_the_same(metrics: dict[str, Any], said: str) -> None:
    none = record("none", peak_live_bytes=100 * MIB, step_median_s=1.0, accuracy_percent=90.0)
    found = Comparison([none, record("a", peak_live_bytes=50 * MIB, step_median_s=1.0, **metrics)])
    assert said in summary.sentence(found, _GROUP, "a")


def test_an_overview_tells_what_was_run_how_it_ended_when_and_where() -> None:
    failed = dataclasses.replace(record("a"), status="failed")
    machine = {"processor": "Z80", "cores": 1, "memory_bytes": 8 * GIB, "commit": "c0ffee"}
    assert summary.overview(run([record("none"), failed], machine=machine)) == (
        "Suite made-up: 2 cases, 1 ok, 1 failed. Measured 2026-11-24 10:00 UTC on Z80, 1 core, 8.000 GiB of memory,"
        " membench at commit c0ffee."
    )
    assert summary.overview(run([], started_at=None)) == "Suite made-up: no case was finished."
