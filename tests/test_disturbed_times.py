"""Times that other processes disturbed: every reader marks them with ``~``, and none concludes anything from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest

from membench.protocol.messages import Result
from membench.protocol.readings import PhaseReading
from membench.records import disturbance
from membench.records.comparison import Comparison
from membench.records.disturbed_times import is_disturbed
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.regression import baseline_text
from membench.regression.decision import said_of_few_times
from membench.regression.judging import judge
from membench.regression.measured import of_records
from membench.regression.noise import Noise
from membench.regression.verdict import Change, Judgement
from membench.report import (
    advice,
    bars,
    case_outcomes,
    history,
    noise,
    pareto,
    phase_table,
    regression,
    savings,
    services,
    summary,
    text,
)
from membench.running import deriving
from membench.running.derived_metrics import DerivedMetrics
from membench.suite import gates
from membench.suite.tolerances import Tolerances

from .made_up import MIB, process, record, run

_GROUP = ("m", "forward", "cpu")
_WHY = "other processes used the cores"


def _timed(technique: str, pace_s: float, *, waited: float = 0.0, repeat: int = 0, **metrics: Any) -> Record:
    """A case with five equal steps whose threads waited for cores for a share of their time.

    ``apply`` was calm, and took half a second.
    """
    known = {
        "peak_live_bytes": 100.0 * MIB,
        "step_median_s": pace_s,
        "tokens_per_s": 100 / pace_s,
        "time_to_first_token_s": pace_s / 10,
        "decode_tokens_per_s": 100 / pace_s,
        "apply_s": 0.5,
        "kl_nats": 0.0,
    }
    read = process(
        phases=[
            {"name": "apply", "duration_s": 0.5, "waited_s": 0.001},
            {"name": "time", "allocator": "default", "duration_s": 5 * pace_s, "waited_s": 5 * waited * pace_s,
             "parts": {"decode": {"durations_s": [0.9 * pace_s] * 5}}},
        ],
        durations_s=[pace_s] * 5,
        waited_s=[waited * pace_s] * 5,
    )  # fmt: skip
    made = record(technique, **(known | metrics))
    return dataclasses.replace(made, repeat=repeat, processes=(read,))


_REFERENCE = _timed("none", 1.0)
_CALM, _DISTURBED = _timed("a", 0.5, waited=0.02), _timed("a", 0.5, waited=1.3)


@pytest.mark.parametrize(
    ("waited_s", "passive", "counted", "are_disturbed"),
    [
        ([0.02, 0.01, 0.0, 0.0, 0.09], None, [0, 1, 2, 3, 4], False),
        ([0.0, 0.5, 0.0, 0.5, 0.0], None, [0, 2, 4], False),
        # Two calm steps of five are too few to go by, and three are enough of however many.
        ([0.5, 0.0, 0.5, 0.5, 0.0], None, [0, 1, 2, 3, 4], True),
        ([0.5] * 30 + [0.0] * 3, None, [30, 31, 32], False),
        # Threads that waited passively took longer, whether they waited for a core or not.
        ([0.0] * 5, [True] * 5, [0, 1, 2, 3, 4], True),
        ([0.0] * 5, [True, False, True, False, False], [1, 3, 4], False),
        (None, None, [0, 1, 2, 3, 4], False),
        ([0.5], None, [0], True),
        ([0.0], None, [0], False),
    ],
)
def test_figures_are_derived_from_calm_steps_or_from_all_and_are_then_disturbed(
    waited_s: list[float] | None, passive: list[bool] | None, counted: list[int], are_disturbed: bool
) -> None:
    durations_s = [1.0] * len(waited_s or passive or range(5))
    read = process(durations_s=durations_s, waited_s=waited_s, passive=passive)
    assert disturbance.counted_steps(durations_s, waited_s, passive) == counted
    assert disturbance.steps_are_disturbed(read) is are_disturbed


def test_times_are_derived_from_calm_steps_with_their_parts() -> None:
    result = Result(
        pinned=True, durations_s=[1.0, 9.0, 2.0, 9.0, 3.0], waited_s=[0.0, 5.0, 0.0, 5.0, 0.0], tokens_per_step=10,
        wait_policy="threads wait as in a user's process",
    )  # fmt: skip
    time = process(phases=[
        {"name": "time", "allocator": "default",
         "parts": {"forward": {"durations_s": [0.1, 0.2, 0.3, 0.3, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3]}}},
    ]).phases[0]  # fmt: skip
    assert isinstance(time, PhaseReading)
    found = DerivedMetrics()
    deriving.times(found, result, time, on_gpu=False)
    assert (found.metrics["step_median_s"], found.metrics["tokens_per_s"]) == (2.0, 5.0)
    assert found.metrics["forward_s"] == pytest.approx(0.4)  # 0.1 + 0.2, 0.2 + 0.2 and 0.3 + 0.3: two passes a step
    assert found.obtained["step_median_s"]["source"].endswith("; threads wait as in a user's process")


def test_all_that_follows_from_the_steps_is_disturbed_with_them_and_phases_by_themselves() -> None:
    fields = [field for field in _DISTURBED.metrics if is_disturbed(_DISTURBED, field)]
    assert fields == ["step_median_s", "tokens_per_s", "time_to_first_token_s", "decode_tokens_per_s"]
    assert not any(is_disturbed(_CALM, field) for field in _CALM.metrics)
    (read,) = _CALM.processes
    busy = [dataclasses.replace(phase, waited_s=phase.duration_s) for phase in read.phases if phase.name == "apply"]
    converted = dataclasses.replace(_CALM, processes=(dataclasses.replace(read, phases=tuple(busy)),))
    assert [field for field in converted.metrics if is_disturbed(converted, field)] == ["apply_s"]


def test_the_energy_of_steps_that_waited_for_calm_in_between_is_disturbed() -> None:
    (read,) = _CALM.processes
    once = dataclasses.replace(_CALM, processes=(dataclasses.replace(read, waited_s=[0.0, 0.4, 0.0, 0.0, 0.0]),))
    assert is_disturbed(once, "energy_j")
    assert not is_disturbed(once, "step_median_s")


def test_the_table_marks_disturbed_times_and_their_ratios() -> None:
    row = text.comparison([_REFERENCE, _DISTURBED]).splitlines()[-1]
    assert "~500 ms ~×0.50" in row
    assert "~200.0 ~×2.00" in row
    assert "100.0 MiB ×1.000" in row
    assert "~" not in text.comparison([_REFERENCE, _CALM])
    # The reference's time is what ratios are taken against.
    row = text.comparison([_timed("none", 1.0, waited=0.5), _CALM]).splitlines()[-1]
    assert "500 ms ~×0.50" in row
    assert "~500 ms" not in row
    (said,) = text.remarks([_REFERENCE, _DISTURBED])
    assert said == f"m/a/forward/cpu: {_WHY} while steps were timed; times marked ~ support no conclusion"


def test_a_calm_repeat_is_believed_and_a_disturbed_one_is_not() -> None:
    found = Comparison([_REFERENCE, _timed("a", 9.0, waited=1.0), _timed("a", 0.5, repeat=1)])
    assert found.value(_GROUP, "a", "step_median_s") == 0.5
    assert found.value(_GROUP, "a", "peak_live_bytes") == 100 * MIB
    assert not found.is_disturbed(_GROUP, "step_median_s", "a")


def test_explanations_and_flat_tables_claim_nothing_of_them() -> None:
    lines = text.explanation([_REFERENCE, _DISTURBED]).splitlines()
    time = [line for line in lines if line.split()[:1] == ["time"]][-1]
    assert time.split()[-3:] == ["~500", "ms", "~×0.50"]
    first, second = json.loads(text.comparison([_REFERENCE, _DISTURBED], "json"))
    assert (first["times_disturbed"], second["times_disturbed"]) == (False, True)
    assert (second["step_median_s"], second["time_ratio"], second["peak_live_ratio"]) == (0.5, None, 1.0)


def test_the_phases_of_a_case_mark_disturbed_durations() -> None:
    lines = phase_table.phases([_DISTURBED]).splitlines()
    told = {line.split()[0]: line for line in lines if line.split()[:1] in (["apply"], ["time"])}
    assert "~2.50 s" in told["time"]
    assert "~" not in told["apply"]


@pytest.mark.parametrize(("other", "front"), [(_CALM, {"a"}), (_DISTURBED, {"none", "a"})])
def test_a_disturbed_speed_puts_nothing_on_the_front_and_nothing_off_it(other: Record, front: set[str]) -> None:
    assert Comparison([_REFERENCE, other]).front(_GROUP) == front
    # A disturbed reference that looks slow is beaten by nothing but what needs less memory or loses less.
    slow = _timed("none", 9.0, waited=1.0)
    assert Comparison([slow, _CALM]).front(_GROUP) == {"none", "a"}


def test_lines_on_what_was_saved_and_cost_leave_disturbed_times_out() -> None:
    assert savings.verdicts([_REFERENCE, _CALM]) == [
        "a: saved time ×0.50, tokens/s ×2.00, first token ×0.50, decode tokens/s ×2.00; cost nothing"
    ]
    assert savings.verdicts([_REFERENCE, _DISTURBED]) == ["a: saved nothing; cost nothing"]


def test_sentences_do_not_speak_of_disturbed_times() -> None:
    assert summary.sentence(Comparison([_REFERENCE, _CALM]), _GROUP, "a").endswith(", in 0.5 times the time.")
    said = summary.sentence(Comparison([_REFERENCE, _DISTURBED]), _GROUP, "a")
    assert said.endswith(f", its time not known because {_WHY}.")


def test_of_techniques_as_small_the_smallest_is_named_where_times_are_disturbed() -> None:
    def named(waited: float) -> list[str | None]:
        small = _timed("small", 2.0, waited=waited, peak_live_bytes=50.0 * MIB)
        fast = _timed("fast", 1.0, waited=waited, peak_live_bytes=51.0 * MIB)
        return [told.technique for told in summary.highlights([_REFERENCE, small, fast])]

    assert (named(0.0), named(0.5)) == (["fast"], ["small"])


def test_pictures_say_whose_times_are_disturbed() -> None:
    found = Comparison([_REFERENCE, _DISTURBED])
    drawn = pareto.pareto(found, _GROUP)
    assert [(point.technique, point.speed) for point in drawn.points] == [("none", 1.0), ("a", 0.0)]
    assert f"Drawn smallest, because {_WHY} and the time says nothing: a." in drawn.caption
    assert {row[0]: row[2] for row in drawn.table}["a"] == "~200.0 ~×2.00"
    # Against time, a disturbed case has no place.
    found = Comparison([_timed("none", 1.0, kl_nats=None), _timed("a", 0.5, waited=1.0, kl_nats=None)])
    drawn = pareto.pareto(found, _GROUP)
    assert [point.technique for point in drawn.points] == ["none"]
    assert "Not drawn, for want of a figure: a." in drawn.caption
    converting = bars.conversion(found, _GROUP)
    assert converting is not None
    assert converting.table[-1][-2:] == ("500 ms ×1.000", "~500 ms ~×0.50")


def test_over_several_runs_a_disturbed_time_is_no_change() -> None:
    def changed(waited: float) -> str:
        runs = [run([_timed("none", pace_s, waited=waited)], started_at=f"2026-11-2{number}T10:00:00+00:00")
                for number, pace_s in enumerate((1.0, 2.0))]  # fmt: skip
        ((*_, times),) = history.history(runs).values()
        return times.caption

    assert "The last against the first: none 100% more." in changed(0.0)
    assert "The last against the first: no change beyond 15.0%." in changed(0.5)
    assert f"Not compared, because {_WHY}: none." in changed(0.5)


def test_advice_does_not_go_by_disturbed_times() -> None:
    def case(technique: str, pace_s: float, mib: float, waited: float) -> Record:
        size = mib * MIB
        return _timed(technique, pace_s, waited=waited, peak_footprint_bytes=size, peak_live_bytes=size)

    def advised(waited: float) -> tuple[str | None, dict[str, str]]:
        cases = [case("none", 1.0, 80, waited), case("small", 2.0, 50, waited)]
        (told,) = advice.advise(cases, 100 * MIB)
        return told.technique, dict(told.others)

    assert advised(0.0)[0] == "none"
    best, others = advised(0.5)
    assert best == "small"
    assert others["none"].endswith(f"but its time is not known: {_WHY}")


def _judged(base: Sequence[Record], new: Sequence[Record]) -> Judgement:
    return judge(of_records(base, "then"), of_records(new, "now"), Tolerances())


def _time(judgement: Judgement) -> Change:
    (found,) = (change for change in judgement.pairs[0].changes if change.metric.name == "time")
    return found


def _repeats(pace_s: float, waited: float = 0.0) -> list[Record]:
    return [_timed("none", pace_s * (1 + number / 1000), waited=waited, repeat=number) for number in range(3)]


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (_repeats(1.0), _repeats(1.5), "regressed"),
        (_repeats(1.0), _repeats(1.5, waited=1.2), "undecided"),
        (_repeats(1.0, waited=1.2), _repeats(1.5), "undecided"),
        (_repeats(1.5), _repeats(1.0), "better"),
        (_repeats(1.5, waited=1.2), _repeats(1.0), "same"),
        (_repeats(1.0), _repeats(1.0, waited=1.2), "same"),
        # Where some repeats are calm, these are judged: alone they are too few to tell a change from chance.
        (_repeats(1.0), [*_repeats(9.0, waited=1.2), *_repeats(1.0)], "same"),
    ],
)
def test_no_verdict_goes_by_disturbed_times(base: list[Record], new: list[Record], verdict: str) -> None:
    assert _time(_judged(base, new)).verdict == verdict


def test_a_disturbed_time_is_undecided_with_its_reason_in_all_outputs_and_fails_nothing() -> None:
    judgement = _judged(_repeats(1.0), _repeats(1.5, waited=1.2))
    change = _time(judgement)
    assert change.reason == f"{_WHY} (now)"
    assert "time 1.00 s → ~1.50 s" in change.sentence()
    assert judgement.exit_code == 0
    row = next(line for line in regression.table([judgement]).splitlines() if "time" in line.split())
    assert "~1.50 s ~×1.50" in row
    assert row.rstrip().endswith("undecided")
    (case,) = case_outcomes.of_judgement(judgement)
    assert case.end == "passed"
    assert [_WHY in line for line in case.undecided] == [True] * len(case.undecided)


def test_a_baseline_keeps_that_its_times_are_disturbed() -> None:
    kept = baseline_text.decoded(baseline_text.encoded(of_records(_repeats(1.0, waited=1.2), "then")).encode())
    judgement = judge(kept, of_records(_repeats(1.5), "now"), Tolerances())
    assert (_time(judgement).verdict, _time(judgement).reason) == ("undecided", f"{_WHY} (the base)")
    case_id = next(iter(kept.cases))
    assert f"while times were measured, {_WHY}" in str(said_of_few_times(kept, [case_id], "remedy"))


def test_noise_is_not_learnt_from_disturbed_times() -> None:
    records = [*_repeats(1.0), *_repeats(9.0, waited=1.2)]
    spread = Noise.of_records(records).spreads[records[0].id]
    assert spread["step_median_s"].runs == 3
    assert spread["peak_live_bytes"].runs == 6
    disturbed = _repeats(1.0, waited=1.2)
    row = next(line for line in noise.table(disturbed, Noise.of_records(disturbed)).splitlines() if " time " in line)
    assert _WHY in row


def test_rules_on_disturbed_times_are_not_checked() -> None:
    rule = gates.parse("time <= 0.4 * reference")
    (calm,) = gates.outcomes([rule], [_REFERENCE, _CALM])
    assert calm.holds is False
    (disturbed,) = gates.outcomes([rule], [_REFERENCE, _DISTURBED])
    assert (disturbed.holds, disturbed.reason) == (None, f"time of the case says nothing: {_WHY}")


def test_services_that_keep_a_history_get_no_disturbed_times() -> None:
    names = [entry["name"] for entry in json.loads(services.benchmark_action([_DISTURBED]))]
    assert "m/a/forward/cpu peak_live" in names
    assert "m/a/forward/cpu time" not in names
    assert "m/a/forward/cpu time" in [entry["name"] for entry in json.loads(services.benchmark_action([_CALM]))]
    assert set(json.loads(services.bencher([_DISTURBED]))["m/a/forward/cpu"]) == {
        field.replace("_", "-") for field in ("peak_live_bytes", "apply_s", "kl_nats")
    }


def test_every_time_says_which_threads_waiting_tells_whether_it_was_disturbed() -> None:
    """Times of the timed steps, and of the phases that are timed as a whole."""
    of_phases = {field for field, metric in METRIC_OF_FIELD.items() if metric.timed_in}
    assert of_phases == {"warmup_s", "apply_s", "store_s", "compress_mb_per_s"}
