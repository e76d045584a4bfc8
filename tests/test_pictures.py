"""What pictures show of records of known figures, and the files that they are drawn to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import membench
from membench import cli
from membench.errors import EXIT_BAD_INPUT, EXIT_OK, MembenchError
from membench.records.comparison import Comparison
from membench.report import bars, files, formats, history, pareto, timeline
from tests import made_up

from .made_up import MIB, record, run

_GROUP = ("m", "forward", "cpu")
_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"


def _placed(**of_the_other: float) -> Any:
    known: dict[str, Any] = {"peak_live_bytes": 100 * MIB, "step_median_s": 1.0}
    none, other = record("none", **known), record("a", **(known | of_the_other))
    return pareto.pareto(Comparison([none, other]), _GROUP)


def test_a_point_lies_at_its_loss_and_its_memory_and_is_as_large_as_it_is_fast() -> None:
    picture = _placed(peak_live_bytes=50 * MIB, step_median_s=0.5, lost_bits_per_byte=0.01)
    none, other = picture.points
    assert (picture.y_title, none.y, other.y) == ("live peak, MiB", 100, 50)
    assert (none.speed, other.speed) == (0.5, 1.0)
    # The axis counts powers of ten, with a place before them for what loses nothing.
    assert (other.x, none.x) == (-2, -3)
    assert picture.ticks[0] == (-3, "none beyond chance")
    assert picture.lowest == ((-3, 100), (-2, 50))


def test_a_loss_that_chance_explains_lies_where_none_does() -> None:
    picture = _placed(lost_bits_per_byte=0.01, lost_bits_per_byte_standard_error=0.006)
    assert picture.points[0].x == picture.points[1].x


def test_what_has_no_place_is_named() -> None:
    failed = dataclasses.replace(record("failed", peak_live_bytes=MIB, step_median_s=1.0), status="failed")
    picture = pareto.pareto(Comparison([record("none", peak_live_bytes=MIB, step_median_s=1.0), failed]), _GROUP)
    assert [point.technique for point in picture.points] == ["none"]
    assert "Not drawn, for want of a figure: failed." in picture.caption
    # Without quality it is drawn against time, and says so.
    assert picture.title == "Memory against time"
    assert "the further left, the less time a step takes" in picture.caption


def test_what_reads_less_is_no_faster_for_having_less_to_read() -> None:
    def read(technique: str, mib: int, seconds: float, tokens_per_s: float) -> Any:
        return record(technique, peak_live_bytes=mib * MIB, step_median_s=seconds, tokens_per_s=tokens_per_s,
                      read_mb_per_s=1.0)  # fmt: skip

    whole, tenth, fast = read("none", 90, 1.0, 1e6), read("tenth", 80, 0.1, 1e6), read("fast", 100, 0.5, 2e6)
    picture = pareto.pareto(Comparison([whole, tenth, fast]), _GROUP)
    assert picture.x_title == "time of a token, µs"
    assert [(point.x, point.speed) for point in picture.points] == [(1.0, 0.5), (1.0, 0.5), (0.5, 1.0)]
    assert "the less time a token takes" in picture.caption
    assert picture.table[0] == ("technique", "live peak", "tokens/s", "Pareto")


def test_a_picture_of_divergence_alone_does_not_call_it_quality() -> None:
    picture = _placed(kl_nats=0.01)
    assert picture.title == "Memory against divergence"
    assert picture.x_title == "KL from the reference, nats a token"
    assert "the nearer the logits are to the reference's (quality itself is not known)" in picture.caption
    assert "quality is lost" not in picture.caption


def test_of_very_many_techniques_the_reference_the_front_and_the_smallest_are_drawn() -> None:
    records = [record(f"t{n}", peak_live_bytes=n * MIB, step_median_s=1.0) for n in range(1, 100)]
    records += [record("none", peak_live_bytes=200 * MIB, step_median_s=1.0)]
    records += [record("fast", peak_live_bytes=500 * MIB, step_median_s=0.1)]
    found = Comparison(records)
    wanted = {"none", "fast", *(f"t{n}" for n in range(1, 59))}
    picture = pareto.pareto(found, _GROUP)
    assert {point.technique for point in picture.points} == wanted
    assert set(bars.memory(found, _GROUP)[0].names) == wanted
    assert picture.caption.endswith("Of 101 techniques 60 are drawn: the front and those with the least live memory.")


def test_bars_hold_weights_live_and_footprint_with_their_ratios() -> None:
    records = [record(name, weights_bytes=size * MIB, peak_live_bytes=2 * size * MIB)
               for name, size in (("none", 64), ("half", 32))]  # fmt: skip
    weights, live = bars.memory(Comparison(records), _GROUP)
    assert (weights.unit, weights.names, weights.series[0].values) == ("MiB", ("none", "half"), (64, 32))
    assert live.table == (("technique", "live peak"), ("none", "128.0 MiB"), ("half", "64.00 MiB ×0.50"))


def _estimated() -> list[Any]:
    return [record("none", weights_bytes=64 * MIB, peak_live_bytes=126 * MIB), record("other", peak_live_bytes=1)]


def test_an_estimate_is_a_line_at_its_own_value_beside_the_bar_of_its_case() -> None:
    records = [record(name, weights_bytes=size * MIB, peak_live_bytes=2 * size * MIB)
               for name, size in (("none", 64), ("half", 32))]  # fmt: skip
    _, live = bars.memory(Comparison(records), _GROUP, Comparison(_estimated()))
    assert live.estimates == ((126, None), ("126.0 MiB (-1.6%)", "–"))
    assert live.table[0] == ("technique", "live peak", "estimated")
    assert live.table[1] == ("none", "128.0 MiB", "126.0 MiB (-1.6%)")
    assert all(picture.estimates is None for picture in bars.memory(Comparison(records), _GROUP))


def test_estimates_are_drawn_into_a_picture_of_memory_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, drawn = tmp_path / "plain.svg", tmp_path / "drawn.svg"
    assert cli.main(["plot", str(_KEPT), "memory", "-o", str(plain)]) == EXIT_OK
    assert cli.main(["plot", str(_KEPT), "memory", "-o", str(drawn), "--estimates", str(_KEPT)]) == EXIT_OK
    assert drawn.read_text().count("line2d") > plain.read_text().count("line2d")
    others = ["plot", str(_KEPT), "pareto", "-o", str(drawn), "--estimates", str(_KEPT)]
    assert cli.main(others) == EXIT_BAD_INPUT
    assert "a picture of pareto has none" in capsys.readouterr().err


def test_a_part_of_what_held_the_memory_looks_the_same_in_every_group() -> None:
    def held(workload: str, **sizes: int) -> Any:
        process = {"breakdown_bytes": {"run": {name: mib * MIB for name, mib in sizes.items()}}, "peak_part": "run"}
        return dataclasses.replace(
            record("none", workload=workload, peak_live_bytes=MIB), processes=(made_up.process(**process),)
        )

    found = Comparison([held("forward", weights=4, other=1), held("train", weights=4, gradients=4, else_=1, other=1)])
    looks = [
        {one.name: one.look for one in picture.series}
        for workload in ("forward", "train")
        if (picture := bars.breakdown(found, ("m", workload, "cpu")))
    ]
    assert looks == [{"weights": 0, "other": 6}, {"weights": 0, "gradients": 1, "other": 6, "else_": 7}]


def test_converting_that_needs_more_than_running_is_named() -> None:
    none = record("none", peak_live_bytes=100 * MIB, apply_peak_live_bytes=90 * MIB)
    costly = record("costly", peak_live_bytes=50 * MIB, apply_peak_live_bytes=150 * MIB)
    picture = bars.conversion(Comparison([none, costly]), _GROUP)
    assert picture
    assert picture.caption == (
        "What comes before the first step needs more live memory than running does: costly (150.0 MiB before, 50.00 MiB"
        " while running)."
    )


_NO_MORE_BEFORE = (
    "No technique needs more live memory before the first step than while running, by more than the figures may be off."
)


@pytest.mark.parametrize(
    ("of_converting", "of_running", "converting_mib", "said"),
    [
        ("exact", "exact", 150, "more live memory than running does: a (150.0 MiB before, 50.00 MiB while running)."),
        ("at least", "exact", 150, "than running does: a (≥150.0 MiB before, 50.00 MiB while running)."),
        ("exact", "at most", 150, "than running does: a (150.0 MiB before, ≤50.00 MiB while running)."),
        ("at most", "exact", 150, "It is not known of: a."),
        ("exact", "at least", 150, "It is not known of: a."),
        ("at most", "exact", 20, _NO_MORE_BEFORE),
        ("at least", "exact", 20, "It is not known of: a."),
    ],
)
def test_of_bounds_no_more_is_claimed_than_they_tell(
    of_converting: str, of_running: str, converting_mib: int, said: str
) -> None:
    none = record("none", peak_live_bytes=100 * MIB, apply_peak_live_bytes=90 * MIB)
    obtained = {"apply_peak_live_bytes": {"bound": of_converting}, "peak_live_bytes": {"bound": of_running}}
    other = record("a", peak_live_bytes=50 * MIB, apply_peak_live_bytes=converting_mib * MIB, obtained=obtained)
    picture = bars.conversion(Comparison([none, other]), _GROUP)
    assert picture
    assert picture.caption.endswith(said)
    assert ("No technique" in picture.caption) is said.startswith("No technique")


def test_the_parts_of_a_peak_are_stacked_to_the_whole() -> None:
    parts = {"forward": {"weights": 3 * MIB, "other": MIB}, "backward": {"weights": MIB}}
    made = dataclasses.replace(record("none"), processes=(made_up.process(breakdown_bytes=parts, peak_part="forward"),))
    picture = bars.breakdown(Comparison([made]), _GROUP)
    assert picture
    assert [(one.name, one.values) for one in picture.series] == [("weights", (3,)), ("other", (1,))]
    assert "none, 4.000 MiB in forward: weights 75%, other 25%" in picture.caption
    assert bars.breakdown(Comparison([record("none")]), _GROUP) is None


def _rank(number: int, peak_part: str = "forward", **mib: int) -> Any:
    sizes = {category: size * MIB for category, size in mib.items()}
    return made_up.process(rank=number, breakdown_bytes={peak_part: sizes}, peak_part=peak_part)


def _on_two_ranks() -> Any:
    first = _rank(0, weights=4, communication=2, other=1)
    second = _rank(1, "backward", weights=4, gradients=4, other=2)
    how = {"peak_live_bytes": {"bound": "exact", "rank": 1}}
    made = record("ddp", peak_live_bytes=10 * MIB, obtained=how)
    return dataclasses.replace(made, processes=(first, second))


def test_each_rank_has_a_bar_of_what_held_its_memory_up_to_its_own_peak() -> None:
    alone = dataclasses.replace(record("none", peak_live_bytes=MIB), processes=(_rank(0, weights=1),))
    picture = bars.ranks(Comparison([alone, _on_two_ranks()]), _GROUP)
    assert picture
    assert (picture.names, picture.stacked, picture.unit) == (("ddp · rank 0", "ddp · rank 1"), True, "MiB")
    held = {one.name: (one.values, one.look) for one in picture.series}
    assert held == {
        "weights": ((4, 4), 0), "gradients": ((0, 4), 1), "communication": ((2, 0), 5), "other": ((1, 2), 6)
    }  # fmt: skip
    assert "ddp from 7.000 MiB (rank 0) to 10.00 MiB (rank 1)" in picture.caption
    assert picture.table[0] == ("technique", "rank", "part of a step", *held)
    assert picture.table[2][:3] == ("ddp", "1", "backward")
    assert bars.ranks(Comparison([alone]), _GROUP) is None, "a case of one process has no ranks to tell apart"


def test_what_held_the_memory_of_a_case_is_that_of_the_rank_that_needs_most() -> None:
    picture = bars.breakdown(Comparison([_on_two_ranks()]), _GROUP)
    assert picture
    assert picture.table[1][:2] == ("ddp", "backward")
    assert "ddp, 10.00 MiB in backward: weights 40%" in picture.caption


def test_a_timeline_of_ranks_counts_from_all_their_baselines_and_the_sum_of_their_peaks_is_a_bound() -> None:
    def rank(number: int, began_s: float, peak_mib: int) -> Any:
        phase = {"name": "run", "allocator": "pinned", "began_s": began_s, "ended_s": 2.0,
                 "peak_live_bytes": peak_mib * MIB}  # fmt: skip
        baseline = {"anonymous_bytes": 5 * MIB, "file_bytes": 2 * MIB}
        return made_up.process(rank=number, baseline=baseline, phases=[phase])

    samples = {"at_s": [0.5, 1.0, 1.5], "rss_bytes": [MIB, 14 * MIB, 20 * MIB]}
    made = dataclasses.replace(record("ddp"), processes=(rank(0, 1.0, 9), rank(1, 1.25, 3)), timeline=samples)
    picture = timeline.timeline(made)
    assert (picture.at_s, picture.columns) == ((1.0, 1.5), {"resident": (0, 6)})
    assert picture.y_title == "MiB above the baselines of 2 ranks, summed"
    (span,) = picture.spans
    assert (span.began_s, span.ended_s, span.peak, span.is_bound) == (1.0, 2.0, 12, True)
    assert span.told == "≤12.00 MiB live of 2 ranks"
    assert (
        "A dotted bar is an upper bound: the sum of the ranks' peaks, which need not fall together." in picture.caption
    )


def test_a_phase_that_one_rank_did_not_reach_has_no_peak_of_all() -> None:
    phase = {"name": "run", "allocator": "pinned", "began_s": 1.0, "ended_s": 2.0, "peak_live_bytes": 9 * MIB}
    ranks = (made_up.process(rank=0, phases=[phase]), made_up.process(rank=1))
    (span,) = timeline.timeline(dataclasses.replace(record("ddp"), processes=ranks)).spans
    assert (span.peak, span.told) == (None, "–")


def _timed(**phase: Any) -> Any:
    told = {"name": "run", "allocator": "pinned", "began_s": 1.0, "ended_s": 2.0, "peak_live_bytes": 9 * MIB} | phase
    process = {"baseline": {"anonymous_bytes": 5 * MIB, "file_bytes": 2 * MIB}, "phases": [told]}
    samples = {"at_s": [0.5, 1.0, 1.5], "rss_bytes": [MIB, 7 * MIB, 10 * MIB], "anonymous_bytes": [0, 5 * MIB, 6 * MIB]}
    return timeline.timeline(
        dataclasses.replace(record("none"), processes=(made_up.process(**process),), timeline=samples)
    )


def test_a_timeline_counts_from_the_workers_baseline_and_draws_the_exact_peak_above_its_samples() -> None:
    picture = _timed()
    assert (picture.unit, picture.at_s) == ("MiB", (1.0, 1.5))
    assert picture.columns == {"resident": (0, 3), "anonymous": (0, 1)}
    (span,) = picture.spans
    assert (span.peak, span.is_bound, span.told) == (9, False, "9.000 MiB live")


def test_a_peak_with_file_pages_in_it_is_a_bound() -> None:
    (span,) = _timed(file_peak_bytes=6 * MIB, file_end_bytes=0).spans
    assert (span.is_bound, span.told) == (True, "≤9.000 MiB live")


def test_a_phase_of_which_a_bound_is_known_is_not_said_to_be_the_highest() -> None:
    def caption(*phases: dict[str, Any]) -> str:
        whole = [{"allocator": "pinned", "began_s": 0.0, "ended_s": 1.0, **phase} for phase in phases]
        process = {"baseline": {"anonymous_bytes": 0, "file_bytes": 0}, "phases": whole}
        return timeline.timeline(dataclasses.replace(record("none"), processes=(made_up.process(**process),))).caption

    run = {"name": "run", "peak_live_bytes": 5 * MIB}
    evaluate = {"name": "evaluate", "peak_live_bytes": 9 * MIB, "file_peak_bytes": 8 * MIB, "file_end_bytes": 0}
    assert " Its highest phase is run: 5.000 MiB live. " in caption(run)
    assert (
        " Of what is known exactly its highest phase is run: 5.000 MiB live;"
        " evaluate may have taken more (≤9.000 MiB live). " in caption(run, evaluate)
    )
    assert "evaluate may have taken the most (≤9.000 MiB live)." in caption(evaluate)
    assert " Its highest phase is time: 9.500 MiB footprint. " in caption(
        evaluate, {"name": "time", "allocator": "default", "peak_footprint_bytes": int(9.5 * MIB)}
    )


def test_a_program_that_took_no_more_than_what_it_was_forked_from_has_a_bound() -> None:
    (span,) = _timed(allocator="default", peak_footprint_bytes=12 * MIB, bound="at most").spans
    assert (span.is_bound, span.told) == (True, "≤12.00 MiB footprint")
    picture = _timed(allocator="default", peak_footprint_bytes=12 * MIB, bound="at most")
    assert "upper bound: the program took no more than what it was forked from." in picture.caption


def test_a_group_whose_live_memory_is_not_known_says_that_and_not_that_it_failed() -> None:
    program = record("none", step_median_s=1.0, peak_footprint_bytes=MIB)
    assert pareto.pareto(Comparison([program]), _GROUP).caption == (
        "Nothing to place: of no case of this group live memory and what it is drawn against are both known."
    )
    failed = dataclasses.replace(program, status="failed")
    assert "no case of this group was measured to its end" in pareto.pareto(Comparison([failed]), _GROUP).caption


def test_under_the_default_allocator_the_footprint_counts() -> None:
    (span,) = _timed(allocator="default", peak_footprint_bytes=12 * MIB).spans
    assert (span.peak, span.told) == (12, "12.00 MiB footprint")


def test_on_a_gpu_what_torch_allocated_counts_and_the_drivers_samples_are_drawn() -> None:
    phase = {"name": "run", "allocator": "default", "began_s": 0.0, "ended_s": 1.0,
             "cuda_peak_allocated_bytes": 3 * MIB}  # fmt: skip
    samples = {"at_s": [0.0, 1.0], "gpu_process_bytes": [None, 4 * MIB]}
    process = {"baseline": {"anonymous_bytes": 5 * MIB, "file_bytes": 0}, "phases": [phase]}
    picture = timeline.timeline(
        dataclasses.replace(record("none"), processes=(made_up.process(**process),), timeline=samples)
    )
    assert picture.columns == {"GPU, process": (None, 4)}
    assert picture.spans[0].told == "3.000 MiB allocated"
    assert picture.y_title == "MiB"
    assert "the GPU's are whole or above idle" in picture.caption


def test_a_case_that_ended_before_anything_was_seen_says_so() -> None:
    picture = timeline.timeline(dataclasses.replace(record("none"), status="crashed"))
    assert picture.caption == "m/none/forward/cpu ended as crashed before anything was seen of its memory."


def _on(day: int, mib: int, suite: str = "made-up", at: str = "10:00:00", **machine: Any) -> Any:
    return run([record("none", peak_live_bytes=mib * MIB)], suite=suite, machine=machine, run=f"run-of-{mib}",
               started_at=f"2026-11-{day}T{at}+00:00")  # fmt: skip


def test_over_time_only_runs_of_one_suite_are_compared() -> None:
    told = history.history([_on(24, 80), _on(22, 100), _on(23, 100, "other")])
    ((suite, group),) = told
    (live,) = told[suite, group]
    assert (suite, group, live.series[0].values, live.breaks) == ("made-up", _GROUP, (100, 80), ())
    assert live.caption == "Live peak over 2 runs. The last against the first: none 20% less."


def test_no_line_goes_through_runs_of_different_machines_or_versions(tmp_path: Path) -> None:
    ours: dict[str, Any] = {"cores": 2, "packages": {"torch": "2.13.0"}}
    theirs, newer = ours | {"cores": 4}, ours | {"packages": {"torch": "2.14.0"}}
    runs = [_on(20, 100, **ours), _on(21, 90, **ours), _on(22, 50, **theirs), _on(23, 90, **ours), _on(24, 80, **newer)]
    ((live,),) = history.history(runs).values()
    assert live.breaks == (2, 3, 4)
    assert list(live.stretches()) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert (
        "No line goes to 2026-11-22 10:00 UTC (commit not known), on another machine or with other versions"
        " (cores: 2, now 4)." in live.caption
    )
    assert "(packages.torch: 2.13.0, now 2.14.0)" in live.caption
    files.draw(runs, "history", tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_runs_of_one_minute_are_told_apart() -> None:
    runs = [_on(20, 100), _on(20, 90, at="10:00:30"), _on(21, 90)]
    ((live,),) = history.history(runs).values()
    assert live.runs == (
        "2026-11-20 10:00 UTC (commit not known) run-of-100", "2026-11-20 10:00 UTC (commit not known) run-of-90",
        "2026-11-21 10:00 UTC (commit not known)",
    )  # fmt: skip
    ((live,),) = history.history([runs[0], runs[0]]).values()
    assert len(set(live.runs)) == 2


def test_of_several_repeats_it_says_which_is_drawn() -> None:
    second = dataclasses.replace(record("none"), repeat=1)
    assert timeline.timeline(second, 3).title == "Memory of m/none/forward/cpu over time, repeat 2 of 3"
    parts = {"forward": {"weights": MIB}}
    made = dataclasses.replace(record("none"), processes=(made_up.process(breakdown_bytes=parts, peak_part="forward"),))
    picture = bars.breakdown(Comparison([made, dataclasses.replace(made, repeat=1)]), _GROUP)
    assert picture
    assert picture.caption.endswith("Of several repeats the first is drawn.")


@pytest.mark.parametrize("kind", formats.PICTURES)
@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_each_kind_of_picture_is_drawn_to_a_file(kind: str, ending: str, tmp_path: Path) -> None:
    whole = membench.read_run(_KEPT)
    kept = [one for one in whole.records if one.case["model"] == "llama-60m" and one.technique in ("none", "bf16")]
    runs = [dataclasses.replace(whole, records=tuple(kept))]
    if kind == "ranks":
        runs = [run([_on_two_ranks()])]
    if kind == "history":
        runs.append(dataclasses.replace(runs[0], header=runs[0].header | {"started_at": "2026-11-25T00:00:00+00:00"}))
    path = tmp_path / f"picture{ending}"
    files.draw(runs, kind, path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == ".png" else b"<?xml")


def test_a_name_in_a_file_is_text_whatever_signs_are_in_it(tmp_path: Path) -> None:
    names = ["none", "$x^2$", "$\\frac{", "<b>&", "名\u202e\x00"]
    records = [record(name, peak_live_bytes=number * MIB, step_median_s=1.0) for number, name in enumerate(names, 1)]
    for kind in ("pareto", "memory"):
        files.draw([run(records)], kind, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("pareto", "picture.pdf", "a picture's file ends in .png or .svg"),
        ("history", "picture.png", "no record there has what 'history' shows"),
        ("pareto", "nowhere/picture.png", "cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_drawn_is_said(kind: str, name: str, message: str, tmp_path: Path) -> None:
    records = [record("none", peak_live_bytes=MIB, step_median_s=1.0)]
    with pytest.raises(MembenchError) as raised:
        files.draw([run(records)], kind, tmp_path / name)
    assert message in str(raised.value)


def test_what_is_too_much_for_one_file_goes_into_further_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_MOST_PANELS", 2)
    path = str(tmp_path / "picture.svg")
    assert cli.main(["plot", str(_KEPT), "memory", "-o", path, "-k", "llama-60m"]) == 0
    assert sorted(drawn.name for drawn in tmp_path.iterdir()) == ["picture-2.svg", "picture-3.svg", "picture.svg"]
    assert f"drawn into 3 files, {path} to picture-3.svg" in capsys.readouterr().out
