"""Tables and verdicts out of records, exactly as they are printed."""

from __future__ import annotations

import dataclasses

import pytest

from membench.records.comparison import Comparison, with_compared
from membench.records.record import Record
from membench.report import savings, text
from tests import made_up

MIB = 2**20


def _record(technique: str, workload: str = "forward", **metrics: float | None) -> Record:
    case = {"model": "m", "technique": technique, "workload": workload, "device": "cpu"}
    return Record(
        case=case, id=f"m/{technique}/{workload}/cpu", repeat=0, status="ok", ended_in=None, message=None,
        started_at="", duration_s=1.0, metrics=metrics, reasons={}, obtained={}, processes=(), remarks=(), notes=(),
        broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


_RECORDS = (
    _record("none", weights_bytes=64 * MIB, step_median_s=0.5, tokens_per_s=512),
    _record("half", weights_bytes=32 * MIB, step_median_s=1.0, tokens_per_s=256),
)


def test_a_table_shows_each_figure_with_its_ratio_to_the_reference() -> None:
    assert text.comparison(_RECORDS) == (
        "m · forward · cpu\n"
        "\n"
        "technique    status    weights          time          tokens/s     Pareto\n"
        "-----------  --------  ---------------  ------------  -----------  --------\n"
        "none         ok        64.00 MiB        500 ms        512.0\n"
        "half         ok        32.00 MiB ×0.50  1.00 s ×2.00  256.0 ×0.50"
    )


def test_a_table_wider_than_the_terminal_goes_on_below() -> None:
    assert text.comparison(_RECORDS, width=60) == (
        "m · forward · cpu\n"
        "\n"
        "technique    status    weights          time\n"
        "-----------  --------  ---------------  ------------\n"
        "none         ok        64.00 MiB        500 ms\n"
        "half         ok        32.00 MiB ×0.50  1.00 s ×2.00\n"
        "\n"
        "technique    status    tokens/s     Pareto\n"
        "-----------  --------  -----------  --------\n"
        "none         ok        512.0\n"
        "half         ok        256.0 ×0.50"
    )


def test_even_the_narrowest_terminal_gets_every_column() -> None:
    shown = text.comparison(_RECORDS, width=1)
    assert [title in shown for title in ("weights", "time", "tokens/s")] == [True, True, True]


def test_a_figure_that_is_not_known_is_a_dash_without_a_ratio() -> None:
    unknown = dataclasses.replace(_RECORDS[1], metrics={"weights_bytes": None, "step_median_s": 1.0})
    row = text.comparison((_RECORDS[0], unknown)).splitlines()[-1]
    assert row == "half         ok        –          1.00 s ×2.00  –"


def test_a_figure_near_the_kernels_own_granularity_is_marked_as_approximate() -> None:
    how = {"peak_live_bytes": {"source": "kernel", "resolution_bytes": MIB // 4}}
    coarse, fine = (dataclasses.replace(_record("none", peak_live_bytes=n * MIB), obtained=how) for n in (4, 6))
    assert "~4.000 MiB" in text.comparison([coarse])
    assert "~" not in text.comparison([fine])


_STACK = (
    _record("none", weights_bytes=100 * MIB, peak_live_bytes=200 * MIB),
    _record("a", weights_bytes=50 * MIB, peak_live_bytes=100 * MIB),
    _record("b", weights_bytes=80 * MIB, peak_live_bytes=160 * MIB),
    _record("a+b", weights_bytes=30 * MIB, peak_live_bytes=120 * MIB),
)


def test_under_a_stack_stands_what_each_member_adds_and_how_they_go_together() -> None:
    assert text.comparison(_STACK) == (
        "m · forward · cpu\n"
        "\n"
        "technique    status    weights          live peak        Pareto    together\n"
        "-----------  --------  ---------------  ---------------  --------  ----------\n"
        "none         ok        100.0 MiB        200.0 MiB\n"
        "a            ok        50.00 MiB ×0.50  100.0 MiB ×0.50\n"
        "b            ok        80.00 MiB ×0.80  160.0 MiB ×0.80\n"
        "a+b          ok        30.00 MiB ×0.30  120.0 MiB ×0.60            ×1.50\n"
        "· a                    ×0.50            ×0.50\n"
        "· +b                   ×0.60            ×1.20"
    )


def test_how_a_stack_goes_together_is_not_known_without_its_members_alone() -> None:
    without_b = [record for record in _STACK if record.technique != "b"]
    assert Comparison(without_b).interaction(("m", "forward", "cpu"), "a+b", "peak_live_bytes") is None


def test_the_front_leaves_out_whatever_another_one_beats() -> None:
    def scored(technique: str, live: int, seconds: float, lost: float | None) -> Record:
        return _record(technique, peak_live_bytes=live, step_median_s=seconds, lost_bits_per_byte=lost)

    records = [
        scored("none", 100, 1.0, None),
        scored("smaller", 50, 1.0, 0.1),
        scored("smaller-and-worse", 50, 1.0, 0.2),
        scored("slower", 100, 2.0, 0.0),
        scored("smallest", 10, 9.0, 0.9),
        dataclasses.replace(scored("failed", 1, 0.1, 0.0), status="failed"),
    ]
    assert Comparison(records).front(("m", "forward", "cpu")) == {"none", "smaller", "smallest"}


def test_an_explanation_shows_every_metric_and_what_held_the_memory() -> None:
    process = {"breakdown_bytes": {"run": {"weights": 30 * MIB, "other": MIB}}, "peak_part": "run"}
    stack = dataclasses.replace(_STACK[3], processes=(made_up.process(**process),))
    assert text.explanation([*_STACK[:3], stack]).split("\n\n")[-1] == (
        "metric                none       a                a+b              together\n"
        "--------------------  ---------  ---------------  ---------------  ----------\n"
        "weights               100.0 MiB  50.00 MiB ×0.50  30.00 MiB ×0.60  ×0.75\n"
        "live peak             200.0 MiB  100.0 MiB ×0.50  120.0 MiB ×1.20  ×1.50\n"
        "at the peak: weights                              30.00 MiB\n"
        "at the peak: other                                1.000 MiB"
    )


def test_converting_that_takes_more_than_running_the_original_is_said() -> None:
    costly = dataclasses.replace(_STACK[1], metrics={"apply_peak_live_bytes": 300 * MIB})
    assert text.remarks([_STACK[0], costly]) == [
        "m/a/forward/cpu: converting takes 300.0 MiB of live memory, more than running the original (200.0 MiB)"
    ]


@pytest.mark.parametrize(
    ("elsewhere_s", "line"),
    [
        (2.0, "half: saved weights ×0.50; cost time ×2.00 to ×4.00"),
        (0.25, "half: saved weights ×0.50; cost nothing; depends on the case: time ×0.50 to ×2.00"),
    ],
)
def test_a_verdict_names_what_was_saved_and_what_it_cost(elsewhere_s: float, line: str) -> None:
    records = (
        _record("none", weights_bytes=64, step_median_s=0.5),
        _record("half", weights_bytes=32, step_median_s=1.0),
        _record("none", "train", weights_bytes=64, step_median_s=0.5),
        _record("half", "train", weights_bytes=32, step_median_s=elsewhere_s),
    )
    assert savings.verdicts(records) == [line]


def test_a_verdict_passes_over_what_two_runs_of_a_case_may_differ_by() -> None:
    def coarse(technique: str, peak_mib: float, time_s: float) -> Record:
        record = _record(technique, weights_bytes=64, peak_live_bytes=peak_mib * MIB, step_median_s=time_s)
        return dataclasses.replace(record, obtained={"peak_live_bytes": {"resolution_bytes": MIB // 4}})

    none = coarse("none", 2.0, 1.0)
    assert savings.verdicts([none, coarse("a", 1.6, 0.86)]) == ["a: saved nothing; cost nothing"]
    assert savings.verdicts([none, coarse("a", 1.4, 0.84)]) == ["a: saved live peak ×0.70, time ×0.84; cost nothing"]


def test_a_verdict_draws_nothing_from_estimates_that_may_be_equal() -> None:
    def estimated(technique: str, footprint_mib: float, peak_mib: float) -> Record:
        record = _record(technique, peak_footprint_bytes=footprint_mib * MIB, peak_live_bytes=peak_mib * MIB)
        off = int(footprint_mib * MIB / 3) + 7 * MIB
        bounds = {"at_least_bytes": (peak_mib - 3) * MIB, "at_most_bytes": (peak_mib + 1) * MIB}
        how = {
            "peak_footprint_bytes": {"bound": "about", "off_bytes": off},
            "peak_live_bytes": {"bound": "about", "resolution_bytes": MIB // 4, **bounds},
        }
        return dataclasses.replace(record, obtained=how)

    none = estimated("none", 90.0, 20.0)
    assert savings.verdicts([none, estimated("a", 54.0, 14.5)]) == ["a: saved nothing; cost nothing"]
    line = "a: saved live peak ×0.68, footprint peak ×0.57; cost nothing"
    assert savings.verdicts([none, estimated("a", 51.0, 13.5)]) == [line]
    tiny = [estimated(name, mib, 10.0) for name, mib in (("none", 4.0), ("a", 11.0))]
    assert savings.verdicts(tiny) == ["a: saved nothing; cost nothing"]


@pytest.mark.parametrize(("mib", "bound"), [(150, "at most"), (50, "at least")])
def test_a_verdict_draws_nothing_from_a_bound_on_the_wrong_side(mib: int, bound: str) -> None:
    none = _record("none", weights_bytes=64, peak_live_bytes=100 * MIB)
    other = _record("a", weights_bytes=64, peak_live_bytes=mib * MIB)
    other = dataclasses.replace(other, obtained={"peak_live_bytes": {"bound": bound}})
    assert savings.verdicts([none, other]) == ["a: saved nothing; cost nothing"]


def test_a_verdict_takes_no_gain_of_quality_in_a_training_for_more_than_chance() -> None:
    def trained(technique: str, lost: float | None) -> Record:
        return _record(technique, weights_bytes=64, final_loss_nats=1.0, lost_bits_per_byte=lost)

    assert savings.verdicts([trained("none", None), trained("a", -0.01)]) == ["a: saved nothing; cost nothing"]
    assert savings.verdicts([trained("none", None), trained("a", 0.01)]) == ["a: saved nothing; cost +0.0100 bits/byte"]


def test_a_verdict_names_the_samples_that_are_got_wrong_for_it() -> None:
    records = [
        _record(name, workload, data_bytes=size, accuracy_percent=percent)
        for name, workload, size, percent in (
            ("none", "digits", 100, 96.9), ("a", "digits", 10, 93.5),
            ("none", "text", 100, 66.0), ("a", "text", 10, 66.4),
        )
    ]  # fmt: skip
    assert savings.verdicts(records) == ["a: saved data ×0.10; cost -3.4 to +0.4 percent of samples"]


def test_a_verdict_spans_all_cases_and_those_that_saved_nothing() -> None:
    records = [
        _record(name, workload, peak_live_bytes=mib * MIB)
        for workload, of in (("forward", {"none": 100, "a": 70}), ("long", {"none": 100, "a": 100}))
        for name, mib in of.items()
    ]
    assert savings.verdicts(records) == ["a: saved live peak ×0.70 to ×1.000; cost nothing"]


@pytest.mark.parametrize(
    ("peak_mib", "time_s", "kl", "is_on"),
    [
        (100, 1.0, 0.0, True),  # the same as the reference
        (101, 0.95, 0.0, False),  # faster by less than two runs differ by, and larger
        (101, 0.80, 0.0, True),
        (120, 1.0, 0.1, False),
        (90, 1.0, 0.1, True),
    ],
)
def test_the_front_passes_over_what_two_runs_of_a_case_may_differ_by(
    peak_mib: float, time_s: float, kl: float, is_on: bool
) -> None:
    none = _record("none", peak_live_bytes=100 * MIB, step_median_s=1.0)
    other = _record("a", peak_live_bytes=peak_mib * MIB, step_median_s=time_s, kl_nats=kl)
    found = Comparison([none, other])
    assert ("a" in found.front(none.group)) is is_on


def test_a_case_that_worked_on_another_text_than_its_reference_says_so() -> None:
    def of(technique: str, corpus: str) -> Record:
        return dataclasses.replace(_record(technique, peak_live_bytes=MIB), processes=(made_up.process(corpus=corpus),))

    (line,) = text.remarks([of("none", "aa"), of("same", "aa"), of("other", "bb")])
    assert line.startswith("m/other/forward/cpu: worked on another text")


def test_less_text_is_on_the_front_for_its_size_and_not_for_a_shorter_epoch() -> None:
    def read(technique: str, seconds: float, tokens_per_s: float, kept: float | None, data: int) -> Record:
        return _record(technique, peak_live_bytes=MIB, step_median_s=seconds, tokens_per_s=tokens_per_s,
                       data_bytes=data, corpus_kept_percent=kept, read_mb_per_s=1.0)  # fmt: skip

    whole, half = read("none", 1.0, 1000.0, None, 100), read("half", 0.5, 1000.0, 50.0, 50)
    assert Comparison([whole, half]).front(whole.group) == {"none", "half"}
    assert savings.verdicts([whole, half])[0].endswith("; cost 50 percent of the text")
    # It takes half the time for half the text: nothing is saved by that.
    assert "time" not in savings.verdicts([whole, half])[0]
    assert "tokens/s ×2.00" in savings.verdicts([whole, read("quick", 0.5, 2000.0, 100.0, 100)])[0]
    packed = read("packed", 1.0, 1000.0, None, 50)
    assert Comparison([whole, half, packed]).front(whole.group) == {"packed"}


@pytest.mark.parametrize(
    ("lost", "error", "line"),
    [
        (0.00001, None, "saved weights ×0.50; cost nothing"),
        (0.0123, None, "saved weights ×0.50; cost +0.0123 bits/byte"),
        (0.0123, 0.0061, "saved weights ×0.50; cost +0.0123 bits/byte"),
        (0.0123, 0.0062, "saved weights ×0.50; cost nothing"),
        (-0.0123, 0.001, "saved weights ×0.50, -0.0123 bits/byte; cost nothing"),
    ],
)
def test_a_verdict_names_what_quality_was_lost_or_gained_beyond_chance(
    lost: float, error: float | None, line: str
) -> None:
    half = _record("half", weights_bytes=32, lost_bits_per_byte=lost, lost_bits_per_byte_standard_error=error)
    records = (_record("none", weights_bytes=64), half)
    assert savings.verdicts(records) == [f"half: {line}"]


def test_a_verdict_counts_the_distance_of_the_logits_where_nothing_else_tells_quality() -> None:
    def far(workload: str, kl: float, lost: float | None = None) -> list[Record]:
        return [_record("none", workload, weights_bytes=64),
                _record("half", workload, weights_bytes=32, kl_nats=kl, lost_bits_per_byte=lost)]  # fmt: skip

    assert savings.verdicts(far("forward", 0.0085)) == ["half: saved weights ×0.50; cost KL 8.5e-03"]
    assert savings.verdicts([*far("forward", 0.0085), *far("train", 0.1)]) == [
        "half: saved weights ×0.50; cost KL 8.5e-03 to 1.0e-01"
    ]
    # Where the loss is known, it tells more; and rounding of the same logits is no distance.
    assert savings.verdicts(far("forward", 0.0085, 0.0)) == ["half: saved weights ×0.50; cost nothing"]
    assert savings.verdicts(far("forward", 1e-7)) == ["half: saved weights ×0.50; cost nothing"]


def test_of_a_technique_without_a_reference_neither_gain_nor_cost_is_claimed() -> None:
    failed = dataclasses.replace(_record("none", weights_bytes=64), status="failed")
    assert savings.verdicts([failed, _record("half", weights_bytes=32)]) == [
        "half: nothing to compare with: 'none' was not measured to its end"
    ]


def test_what_several_repeats_say_alike_is_said_once_and_their_breakdown_is_of_the_first() -> None:
    process = {"breakdown_bytes": {"run": {"weights": 30 * MIB}}, "peak_part": "run"}
    first = dataclasses.replace(_STACK[1], notes=("a note",), processes=(made_up.process(**process),))
    records = [_STACK[0], first, dataclasses.replace(first, repeat=1)]
    assert text.remarks(records) == ["m/a/forward/cpu: a note"]
    assert "at the peak of the first repeat: weights" in text.explanation(records)
    assert "at the peak: weights" in text.explanation(records[:2])


def test_what_an_optimizer_keeps_is_shown_where_a_technique_changes_it() -> None:
    none, half = (_record(name, optimizer_state_bytes=size * MIB) for name, size in (("none", 100), ("half", 50)))
    assert "50.00 MiB ×0.50" in text.comparison([none, half])
    same = _record("same", optimizer_state_bytes=102 * MIB)
    assert "optimizer state" not in text.comparison([none, same])


def test_a_bound_says_which_and_a_negative_difference_is_not_approximate() -> None:
    none = _record("none", peak_live_bytes=100 * MIB)
    mapped = dataclasses.replace(
        _record("mapped", peak_live_bytes=71 * MIB, lost_bits_per_byte=-0.0004),
        obtained={"peak_live_bytes": {"bound": "at most", "resolution_bytes": MIB}, "lost_bits_per_byte": {}},
    )
    shown = text.comparison([none, mapped])
    assert " ≤71.00 MiB ≤×0.71 " in shown
    assert " -0.0004" in shown
    seen = dataclasses.replace(mapped, obtained={"peak_live_bytes": {"bound": "at least"}})
    assert " ≥71.00 MiB ≥×0.71" in text.comparison([none, seen])
    other = _record("other", peak_live_bytes=50 * MIB)
    below = dataclasses.replace(none, obtained={"peak_live_bytes": {"bound": "at most"}})
    assert " 50.00 MiB ≥×0.50" in text.comparison([below, other])
    assert " ≥71.00 MiB ≥×0.71" in text.comparison([below, seen])
    assert " ≤71.00 MiB ~×0.71" in text.comparison([below, mapped])


def test_a_bound_that_may_be_too_high_accuses_nobody() -> None:
    def lines(bound: str) -> list[str]:
        costly = _record("a", peak_live_bytes=1, apply_peak_live_bytes=300 * MIB)
        obtained = {"apply_peak_live_bytes": {"bound": bound, "resolution_bytes": MIB}}
        return text.remarks([_STACK[0], dataclasses.replace(costly, obtained=obtained)])

    assert len(lines("exact")) == 1
    assert lines("at most") == []
    costly = _record("a", peak_live_bytes=1, apply_peak_live_bytes=300 * MIB)
    seen = dataclasses.replace(_STACK[0], obtained={"peak_live_bytes": {"bound": "at least"}})
    assert text.remarks([seen, costly]) == []


def test_loading_that_takes_more_than_running_the_original_is_said_where_the_technique_is_why() -> None:
    none = _record("none", peak_live_bytes=100 * MIB, load_peak_live_bytes=150 * MIB)
    twice = _record("plain-load", load_peak_live_bytes=200 * MIB)
    same = _record("bf16", load_peak_live_bytes=151 * MIB)
    assert text.remarks([none, twice, same]) == [
        "m/plain-load/forward/cpu: loading takes 200.0 MiB of live memory, more than running the original (100.0 MiB)"
    ]


def test_what_a_member_adds_to_a_loss_of_quality_is_a_difference() -> None:
    lost = {"none": None, "a": 0.0100, "b": 0.0300, "a+b": 0.0350}
    records = [
        _record(name, weights_bytes=1, lost_bits_per_byte=value, kl_nats=None if value is None else value / 10)
        for name, value in lost.items()
    ]
    rows = {row.split()[0] + row.split()[1]: row.split() for row in text.comparison(records).splitlines() if row}
    assert rows["·a"][2:] == ["×1.000", "+0.0100", "+1.0e-03"]
    assert rows["·+b"][2:] == ["×1.000", "+0.0250", "+2.5e-03"]


@pytest.mark.parametrize(
    ("running_mib", "converting_mib", "is_shown"), [(150, 210, True), (150, 202, False), (300, 210, False)]
)
def test_peaks_of_loading_and_converting_are_shown_where_they_decide_what_memory_is_needed(
    running_mib: int, converting_mib: int, is_shown: bool
) -> None:
    none = _record("none", peak_live_bytes=running_mib * MIB, apply_peak_live_bytes=200 * MIB)
    other = _record("other", peak_live_bytes=running_mib * MIB, apply_peak_live_bytes=converting_mib * MIB)
    assert ("apply peak" in text.comparison([none, other])) is is_shown
    cost = f"apply peak ×{converting_mib / 200:.3f}" if is_shown else "nothing"
    assert savings.verdicts([none, other]) == [f"other: saved nothing; cost {cost}"]


def test_a_kept_stack_brings_along_what_it_is_compared_with_and_no_more() -> None:
    other = _record("c", weights_bytes=1)
    kept = with_compared([*_STACK, other, _record("none", "train")], [_STACK[3]])
    assert [(record.technique, record.case["workload"]) for record in kept] == [
        (name, "forward") for name in ("none", "a", "b", "a+b")
    ]
