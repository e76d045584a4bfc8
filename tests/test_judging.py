"""What two measurements of a case come to: tolerances, noise, chance, machines, exit codes, words."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import RuleError
from membench.host import environment
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD, METRICS
from membench.records.run_file import read_run
from membench.regression import machines, timing
from membench.regression.judging import judge
from membench.regression.measured import Measured, MeasuredCase, Modules, of_run
from membench.regression.noise import Noise, Spread
from membench.regression.verdict import Change, Judgement
from membench.suite.tolerances import Tolerances, of_table, parse_fail

MIB = 2**20
_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
_MACHINE: Mapping[str, Any] = {
    "processor": "AMD EPYC", "cores": 2, "threads": 2, "memory_bytes": 24 * 2**30, "python": "3.11.7",
    "cpu": {"instructions": ["avx2"], "vendor": "AuthenticAMD"}, "packages": {"torch": "2.13.0"}, "variables": {},
}  # fmt: skip


def _metric(name: str) -> Metric:
    return next(metric for metric in METRICS if metric.name == name)


def _case(id: str = "m/x/train/cpu", *, times: Sequence[Sequence[float]] = (), **values: float) -> MeasuredCase:
    measured: dict[str, list[float]] = {name: [value] for name, value in values.items()}
    if times:
        measured["step_median_s"] = [sorted(repeat)[len(repeat) // 2] for repeat in times]
    return MeasuredCase(id, "ok", values=measured, samples={"step_median_s": times} if times else {})


def _measured(*cases: MeasuredCase, noise: Noise | None = None, **machine: Any) -> Measured:
    described = {**_MACHINE, **machine}
    return Measured("some", "s", described, "2026", {case.id: case for case in cases}, noise or Noise())


def _judged(base: MeasuredCase, new: MeasuredCase, *fail: str, noise: Noise | None = None) -> Judgement:
    tolerances = Tolerances(command_line=[parse_fail(text) for text in fail])
    return judge(_measured(base, noise=noise), _measured(new), tolerances)


def _undecided(judgement: Judgement) -> tuple[str, str | None]:
    (change,) = judgement.undecided
    assert change.reason is not None
    return change.reason, change.advice


def _verdict(judgement: Judgement, name: str) -> str:
    return _change(judgement, name).verdict


def _change(judgement: Judgement, name: str) -> Change:
    (found,) = (c for pair in judgement.pairs for c in pair.changes if c.metric.name == name)
    return found


@pytest.mark.parametrize(
    ("fail", "grown_mib", "verdict"),
    [
        ([], 100.9, "same"),
        ([], 101.1, "regressed"),
        ([], 98.9, "better"),
        (["weights:5%"], 104, "same"),
        (["weights:5%"], 106, "regressed"),
        (["weights:16MiB"], 115, "same"),
        (["weights:16MiB"], 117, "regressed"),
        (["weights:50%", "weights:16MiB"], 120, "regressed"),
        (["weights:2%", "m/*:weights:50%"], 120, "same"),
        (["m/*:weights:50%", "m/x/train/*:weights:2%"], 103, "regressed"),
        (["weights:off"], 200, "worse"),
    ],
)
def test_a_figure_regresses_where_it_gets_worse_by_more_than_is_tolerated(
    fail: list[str], grown_mib: float, verdict: str
) -> None:
    judgement = _judged(_case(weights_bytes=100 * MIB), _case(weights_bytes=grown_mib * MIB), *fail)
    assert _verdict(judgement, "weights") == verdict


def test_a_suite_says_more_than_the_defaults_and_the_command_line_more_than_a_suite() -> None:
    suite = of_table({"peak_live": "3%", "case": [{"match": "big/*", "peak_live": ["5%", "1 GiB"]}]})
    peak = _metric("peak_live")
    both = Tolerances(suite, [parse_fail("big/x/*:peak_live:7%")])
    assert [str(one) for one in both.of("small/x/train/cpu", peak)] == ["peak_live:3%"]
    assert [str(one) for one in both.of("big/y/train/cpu", peak)] == ["big/*:peak_live:5%", "big/*:peak_live:1.000 GiB"]
    assert [str(one) for one in both.of("big/x/train/cpu", peak)] == ["big/x/*:peak_live:7%"]
    assert [str(one) for one in both.of("big/x/train/cpu", _metric("weights"))] == ["weights:1%"]


def test_the_id_of_a_case_on_a_second_gpu_can_be_a_pattern() -> None:
    one = parse_fail("m/x/train/cuda:1:time:10%")
    assert (one.match, one.metric.name, one.amount) == ("m/x/train/cuda:1", "time", 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("peek_live:2%", "--fail 'peek_live:2%': no metric is named 'peek_live'; did you mean 'peak_live'?"),
        ("peak_live", "--fail 'peak_live': write METRIC:AMOUNT or PATTERN:METRIC:AMOUNT, such as 'peak_live:2%'"),
        (":time:2%", "--fail ':time:2%': write METRIC:AMOUNT or PATTERN:METRIC:AMOUNT, such as 'peak_live:2%'"),
        (
            "peak_live:2",
            "--fail 'peak_live:2': write a share such as '2%', or a size in B, KiB, MiB, GiB or TiB, such as '2 GiB',"
            " or 'off'",
        ),
        ("accuracy:2%", "--fail 'accuracy:2%': a share of it has no meaning; write a bare number of percent"),
    ],
)  # fmt: skip
def test_a_tolerance_that_cannot_be_understood_is_one_line_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(RuleError) as raised:
        parse_fail(text)
    assert str(raised.value) == message


def test_a_pattern_that_fits_no_case_is_told() -> None:
    with pytest.raises(RuleError, match=r"tolerance 'lama/\*:time:2%' fits no case; known: llama/none/train/cpu"):
        Tolerances(command_line=[parse_fail("lama/*:time:2%")]).refuse_unmatched(["llama/none/train/cpu"])


def _kernel(peak_mib: float) -> MeasuredCase:
    return dataclasses.replace(_case(peak_live_bytes=peak_mib * MIB), resolution_bytes={"peak_live_bytes": 256 * 2**10})


@pytest.mark.parametrize(("base_mib", "verdict"), [(10, "same"), (60, "regressed")])
def test_three_percent_more_is_told_once_it_is_more_than_the_kernels_counters_may_be_off(
    base_mib: float, verdict: str
) -> None:
    assert _verdict(_judged(_kernel(base_mib), _kernel(base_mib * 1.03)), "peak_live") == verdict


def test_no_tolerance_is_below_the_noise_that_is_kept_with_the_base() -> None:
    spread = Spread(2, 1.0 * MIB)
    assert spread.floor == pytest.approx(3 * 2**0.5 / 1.128 * MIB)
    noise = Noise({"m/x/train/cpu": {"weights_bytes": spread}})
    base, new = _case(weights_bytes=100 * MIB), _case(weights_bytes=103 * MIB)
    assert _verdict(_judged(base, new), "weights") == "regressed"
    judgement = _judged(base, new, "weights:0.1%", noise=noise)
    assert _verdict(judgement, "weights") == "same"
    assert "noise of this machine 3.761 MiB" in _change(judgement, "weights").sentence()
    assert _verdict(_judged(base, _case(weights_bytes=104 * MIB), noise=noise), "weights") == "regressed"


def test_noise_is_estimated_as_if_it_were_normal() -> None:
    # Of normal values, the range of n overestimates nothing on average: the floor is three deviations of a difference.
    normal = random.Random(0)
    for runs in (2, 5, 10, 20):
        floors = []
        for _ in range(4000):
            drawn = [normal.gauss(0, 1) for _ in range(runs)]
            floors.append(Spread(runs, max(drawn) - min(drawn)).floor)
        assert sum(floors) / len(floors) == pytest.approx(3 * 2**0.5, rel=0.03)


def test_medians_of_many_repeats_of_one_run_are_as_far_from_those_of_the_next_as_single_ones() -> None:
    # What sets a run apart is in each of its repeats: here it is all there is.
    drawn, alarms = random.Random(0), 0
    runs = [drawn.gauss(100, 0.5) for _ in range(5 + 2 * 400)]
    noise = Noise.of_values({"m/x/train/cpu": {"weights_bytes": [each * MIB for each in runs[:5]]}})
    pairs = zip(runs[5::2], runs[6::2], strict=True)
    for before, now in pairs:
        base, new = (
            MeasuredCase("m/x/train/cpu", "ok", values={"weights_bytes": [each * MIB] * 5}) for each in (before, now)
        )
        alarms += _judged(base, new, "weights:0.1%", noise=noise).exit_code
    assert alarms <= 400 * 0.017


def test_of_two_noises_the_larger_one_counts() -> None:
    quiet, loud = (Noise({"c": {"weights_bytes": Spread(5, size)}}) for size in (1.0, 2.0))
    assert (quiet | loud).floor("c", "weights_bytes") == loud.floor("c", "weights_bytes")
    assert (quiet | Noise()).floor("c", "weights_bytes") == quiet.floor("c", "weights_bytes")


def _steps(pace_s: float, repeats: int, spread: float = 0.02, seed: int = 0) -> list[list[float]]:
    drawn = random.Random(seed)
    return [[pace_s * drawn.uniform(1, 1 + spread) for _ in range(5)] for _ in range(repeats)]


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (_steps(1.0, 3), _steps(1.2, 3, seed=1), "regressed"),
        # The one repeat of the base may have had the machine to itself.
        (_steps(1.0, 1), _steps(1.2, 4, seed=1), "undecided"),
        (_steps(1.0, 5), _steps(1.2, 5, seed=1), "regressed"),
        (_steps(1.0, 3), _steps(1.05, 3, seed=1), "same"),
        (_steps(1.0, 3), _steps(1.2, 1, seed=1), "undecided"),
        # A neighbour came for two repeats of three: the third shows the true pace.
        (_steps(1.0, 3), [*_steps(1.8, 2, seed=1), *_steps(1.0, 1, seed=2)], "undecided"),
        # The base has a repeat as slow as these: with so few, that may be all there is to it.
        ([*_steps(1.0, 2), *_steps(1.2, 1, seed=3)], _steps(1.2, 3, seed=1), "undecided"),
        # Each pace comes with five steps, which are no five witnesses.
        ([*_steps(1.0, 3), *_steps(1.2, 2)], _steps(1.2, 5, seed=1), "undecided"),
        (_steps(1.2, 3), _steps(1.0, 3, seed=1), "better"),
        (_steps(1.2, 3), _steps(1.0, 1, seed=1), "same"),
    ],
)
def test_time_regresses_where_several_repeats_say_so(
    base: list[list[float]], new: list[list[float]], verdict: str
) -> None:
    assert _verdict(_judged(_case(times=base), _case(times=new)), "time") == verdict


def _noise_of_times(share: float, runs: int = 5) -> Noise:
    """Of a machine where the range of so many runs spans this share of their median."""
    return Noise({"m/x/train/cpu": {"step_median_s": Spread(runs, share, 1.0)}})


@pytest.mark.parametrize(
    ("share", "base", "new", "verdict"),
    [
        # One run against one, as 'repeats = 1' leaves it: 3 deviations of a difference are 1.82 times the range.
        (0.05, 1, 1, "regressed"),
        (0.05, 1, 4, "regressed"),
        (0.12, 1, 1, "undecided"),
        (0.12, 1, 4, "undecided"),
        # Of runs that differ by as much, no number of repeats tells which one was the code's.
        (0.12, 5, 5, "undecided"),
        (0.05, 5, 5, "regressed"),
        (0.05, 5, 1, "regressed"),
    ],
)
def test_a_fifth_slower_is_told_where_runs_of_the_same_code_are_known_to_differ_by_less(
    share: float, base: int, new: int, verdict: str
) -> None:
    judgement = _judged(
        _case(times=_steps(1.0, base)), _case(times=_steps(1.2, new, seed=1)), noise=_noise_of_times(share)
    )
    assert _verdict(judgement, "time") == verdict
    if verdict == "undecided":
        reason, advice = _undecided(judgement)
        assert reason == "runs of the same code may differ by 24% on this machine"
        assert advice == (
            "to tell such a time from chance, measure both in turn: 'membench run SUITE --against-ref GIT_REF'"
        )
    else:
        assert "tolerance 10%, noise of this machine 9.5%" in judgement.sentences()[0]


def test_calibrated_noise_raises_no_tolerance_of_a_time() -> None:
    judgement = _judged(_case(times=_steps(1.0, 1)), _case(times=_steps(1.2, 1)), noise=_noise_of_times(10.0))
    assert _change(judgement, "time").allowed == pytest.approx(0.1, rel=0.02)
    assert _verdict(judgement, "time") == "undecided"


def test_a_gain_within_the_noise_is_none() -> None:
    base, new = _case(times=_steps(1.2, 1)), _case(times=_steps(1.0, 1))
    verdicts = [_verdict(_judged(base, new, noise=_noise_of_times(share)), "time") for share in (0.05, 0.12)]
    assert verdicts == ["better", "same"]


def test_what_fewer_than_five_runs_show_of_noise_tells_no_time_from_chance() -> None:
    base, new = _case(times=_steps(1.0, 1)), _case(times=_steps(1.2, 1))
    verdicts = [_verdict(_judged(base, new, noise=_noise_of_times(0.01, runs)), "time") for runs in (4, 5)]
    assert verdicts == ["undecided", "regressed"]


@pytest.mark.parametrize(("base", "new", "which"), [(1, 4, "the base was measured once"), (3, 2, "measured 2 times")])
def test_a_time_that_repeats_are_too_few_for_says_what_would_tell(base: int, new: int, which: str) -> None:
    judgement = _judged(_case(times=_steps(1.0, base)), _case(times=_steps(1.3, new, seed=1)))
    reason, advice = _undecided(judgement)
    assert reason == f"{which}, which a busy machine can look like"
    for way in ("--against-ref GIT_REF", "repeats = 3", "'membench calibrate SUITE [NAME]'"):
        assert advice is not None
        assert way in advice
    assert judgement.sentences()[-1] == advice
    assert judgement.exit_code == 0


def test_what_would_tell_is_said_once_for_all_cases() -> None:
    ids = ("m/x/train/cpu", "m/y/train/cpu")
    base, new = (_measured(*(_case(case_id, times=_steps(pace, 1)) for case_id in ids)) for pace in (1.0, 1.3))
    said = judge(base, new, Tolerances()).sentences()
    assert [line.partition(":")[0] for line in said[:2]] == ["undecided", "undecided"]
    assert len(said) == 3


def test_where_both_were_measured_in_turn_what_would_tell_is_more_of_that() -> None:
    base, new = _measured(_case(times=_steps(1.0, 1))), _measured(_case(times=_steps(1.3, 1)))
    last = judge(base, new, Tolerances(), in_turn=True).sentences()[-1]
    assert "'--repeats N'" in last
    assert "--against-ref" not in last


def test_by_noise_the_same_code_is_called_slower_as_often_as_is_said() -> None:
    drawn, pairs = random.Random(0), 4000

    def run() -> float:
        return drawn.lognormvariate(0, 0.1)

    def is_alarm() -> bool:
        noise = Noise.of_values({"m/x/train/cpu": {"step_median_s": [run() for _ in range(5)]}})
        factor = noise.factor("m/x/train/cpu", "step_median_s")
        return timing.compare([[run()]], [[run()]]).is_certainly_slower(0.0, factor)

    assert sum(is_alarm() for _ in range(pairs)) / pairs == pytest.approx(0.017, abs=0.006)


@pytest.mark.parametrize(("repeats", "most"), [((3, 3), 0.05), ((3, 4), 0.029), ((4, 4), 0.02), ((6, 3), 0.02)])
def test_by_rank_the_same_code_is_called_slower_as_often_as_is_said(repeats: tuple[int, int], most: float) -> None:
    drawn, pairs = random.Random(0), 1500

    def is_alarm() -> bool:
        base, new = ([[drawn.lognormvariate(0, 0.1)] for _ in range(count)] for count in repeats)
        return timing.compare(base, new).is_certainly_slower(0.0)

    assert sum(is_alarm() for _ in range(pairs)) / pairs <= most + 0.01


@pytest.mark.parametrize(("base", "new", "verdict"), [(3, 3, "regressed"), (3, 4, "regressed"), (2, 4, "undecided")])
def test_a_duration_that_there_is_one_of_in_each_repeat_is_told_by_repeats_alone(
    base: int, new: int, verdict: str
) -> None:
    drawn = random.Random(0)

    def warmed_up(pace_s: float, repeats: int) -> MeasuredCase:
        return MeasuredCase("c", "ok", values={"warmup_s": [pace_s * drawn.uniform(1, 1.02) for _ in range(repeats)]})

    judgement = _judged(warmed_up(1.0, base), warmed_up(1.3, new), "warmup_time:10%")
    assert _verdict(judgement, "warmup_time") == verdict


def test_a_runs_own_repeats_say_nothing_of_how_far_apart_times_of_runs_are() -> None:
    from membench.regression.measured import of_records

    (record,) = (record for record in read_run(_KEPT).records if record.id == "trained-tiny/none/generate/cpu")
    metrics = {**record.metrics, "own.sharpness.higher": 0.5, "own.x": 1, "of_a_later_version": 1}
    again = [dataclasses.replace(record, repeat=number, metrics=metrics) for number in range(5)]
    known = of_records(again, "r").noise.spreads[record.id]
    assert {"peak_live_bytes", "own.sharpness.higher"} <= set(known)
    assert [name for name in known if METRIC_OF_FIELD[name].depends_on == "time"] == []


def test_runs_of_the_same_pace_on_a_busy_machine_raise_no_alarm_once_suspects_are_measured_again() -> None:
    drawn = random.Random(0)

    def busy() -> list[list[float]]:
        # Half of the repeats share the machine with somebody, and take up to twice as long.
        loads = [drawn.choice((1.0, drawn.uniform(1, 2))) for _ in range(3)]
        return [[load * drawn.uniform(1, 1.03) for _ in range(5)] for load in loads]

    def is_alarm() -> bool:
        base, new = busy(), busy()
        if not _judged(_case(times=base), _case(times=new)).suspects:
            return False
        return _verdict(_judged(_case(times=base), _case(times=[*new, *busy()])), "time") == "regressed"

    assert [is_alarm() for _ in range(100)] == [False] * 100


@pytest.mark.parametrize(("waited_s", "verdict"), [(0.0, "regressed"), (0.05, "regressed"), (0.2, "undecided")])
def test_steps_that_waited_for_a_core_are_no_slower(waited_s: float, verdict: str) -> None:
    base, new = _case(times=_steps(1.0, 3)), _case(times=_steps(1.25, 3, seed=1))
    new = dataclasses.replace(new, waited_s=[[waited_s] * 5] * 3)
    judgement = _judged(base, new)
    assert _verdict(judgement, "time") == verdict
    reason = "the rest of it went to waiting for a core: the machine is busy" if verdict == "undecided" else None
    assert _change(judgement, "time").reason == reason


def test_times_of_versions_that_set_the_wait_policy_are_not_judged_and_memory_is() -> None:
    earlier, now = ({"OMP_WAIT_POLICY": policy} for policy in ("PASSIVE", None))
    base = _case(times=_steps(1.0, 3), peak_live_bytes=100 * MIB)
    new = _case(times=_steps(0.5, 3, seed=1), peak_live_bytes=100 * MIB)
    judgement = judge(_measured(base, variables=earlier), _measured(new, variables=now), Tolerances())
    assert (_change(judgement, "time").verdict, _change(judgement, "time").reason) == (
        "not judged",
        "the machines differ in variables.OMP_WAIT_POLICY: PASSIVE, now None (earlier versions of membench set it,"
        " and measured longer times)",
    )
    assert _verdict(judgement, "peak_live") == "same"


def test_a_rate_that_falls_is_a_time_that_grows() -> None:
    def rated(pace_s: float) -> MeasuredCase:
        rates = [[10 / each for each in repeat] for repeat in _steps(pace_s, 3)]
        return MeasuredCase("c", "ok", values={"tokens_per_s": [10 / pace_s] * 3}, samples={"tokens_per_s": rates})

    change = _change(_judged(rated(1.0), rated(1.25), "tokens_per_s:10%"), "tokens_per_s")
    assert change.verdict == "regressed"
    assert change.ratio == pytest.approx(0.8)
    assert change.interval is not None
    assert change.interval[0] <= 0.8 <= change.interval[1] < 1


def test_an_undecided_time_is_a_suspect_and_fails_nothing() -> None:
    judgement = _judged(_case(times=_steps(1.0, 1)), _case(times=_steps(1.3, 1, seed=1)))
    assert (judgement.suspects, judgement.exit_code) == (("m/x/train/cpu",), 0)


@pytest.mark.parametrize(
    ("machine", "time", "peak", "weights", "code"),
    [
        ({}, "same", "same", "same", 0),
        ({"packages": {"torch": "2.14.0"}}, "same", "same", "same", 0),
        ({"python": "3.12.1", "memory_bytes": 30 * 2**30}, "same", "same", "same", 0),
        ({"processor": "Intel Xeon"}, "not judged", "same", "same", 0),
        ({"cores": 4}, "not judged", "same", "same", 0),
        ({"threads": 4}, "not judged", "not judged", "same", 3),
        ({"cpu": {"instructions": ["avx512f"], "vendor": "AuthenticAMD"}}, "not judged", "not judged", "same", 3),
    ],
)
def test_figures_are_held_against_those_of_a_machine_that_is_alike_in_what_they_hang_on(
    machine: dict[str, Any], time: str, peak: str, weights: str, code: int
) -> None:
    case = _case(times=_steps(1.0, 3), peak_live_bytes=60 * MIB, weights_bytes=50 * MIB)
    judgement = judge(_measured(case), _measured(case, **machine), Tolerances())
    assert [_verdict(judgement, name) for name in ("time", "peak_live", "weights")] == [time, peak, weights]
    assert judgement.exit_code == code
    anyway = judge(_measured(case), _measured(case, **machine), Tolerances(), across_machines=True)
    assert anyway.exit_code == 0
    assert [str(difference) for difference in anyway.differences] == [str(one) for one in judgement.differences]


def test_a_time_that_was_asked_for_and_cannot_be_judged_is_no_success() -> None:
    case = _case(times=_steps(1.0, 3), weights_bytes=MIB)
    asked = Tolerances(command_line=[parse_fail("time:10%")])
    assert judge(_measured(case), _measured(case, processor="another"), asked).exit_code == 3


def test_on_a_gpu_live_memory_hangs_on_the_card_and_not_on_the_processor() -> None:
    def bars(base: dict[str, Any], new: dict[str, Any]) -> set[str]:
        found = machines.differences({**_MACHINE, **base}, {**_MACHINE, **new})
        return {kind for difference in found for kind in difference.bars(on_gpu=True)}

    card = {"name": "H100", "memory_bytes": 80 * 2**30, "driver": "570"}
    assert bars({"gpus": [card]}, {"gpus": [{**card, "name": "H200"}]}) == {"live", "footprint", "time"}
    assert bars({"gpus": [card]}, {"gpus": [{**card, "driver": "580"}]}) == {"footprint", "time"}
    assert bars({"gpus": [card], "threads": 2}, {"gpus": [card], "threads": 8}) == {"time"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_under_other_settings_of_its_allocator_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = environment.describe(1)
    monkeypatch.setenv(name, "expandable_segments:True")
    (difference,) = machines.differences(before, environment.describe(1))
    assert difference.respect == f"variables.{name}"
    assert "live" in difference.bars(on_gpu=True)
    assert not difference.bars(on_gpu=False)


def test_of_one_run_each_case_is_judged_by_what_its_own_device_hangs_on() -> None:
    def peak(device: str) -> MeasuredCase:
        return dataclasses.replace(_case(f"m/x/train/{device}", peak_live_bytes=60 * MIB), device=device)

    def verdicts(base: dict[str, Any], new: dict[str, Any]) -> list[str]:
        cases = [peak("cpu"), peak("cuda:1")]
        judgement = judge(_measured(*cases, **base), _measured(*cases, **new), Tolerances())
        return [change.verdict for pair in judgement.pairs for change in pair.changes]

    card = {"name": "H100", "memory_bytes": 80 * 2**30, "driver": "570"}
    assert verdicts({"gpus": [card], "threads": 2}, {"gpus": [card], "threads": 8}) == ["not judged", "same"]
    assert verdicts({"gpus": [card]}, {"gpus": [{**card, "name": "H200"}]}) == ["same", "not judged"]


@pytest.mark.parametrize(
    ("machine", "on_gpu", "name"),
    [
        ({"processor": "AMD EPYC", "threads": 2}, False, "2-cores-epyc"),
        ({"processor": "AMD EPYC 7763 64-Core Processor", "threads": 4}, False, "4-cores-epyc-7763"),
        ({"processor": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "threads": 4}, False,
         "4-cores-xeon-platinum-8370c"),
        ({"processor": None, "cpu": {"vendor": "0x41", "model": "0xd0c"}, "threads": 4}, False, "4-cores-0x41-0xd0c"),
        ({"processor": "../../etc/passwd\n\x1b[31m", "threads": 1}, False, "1-cores-etc-passwd-31m"),
        ({"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}, True, "1-h100-80gb-hbm3"),
    ],
)  # fmt: skip
def test_a_machine_class_is_a_short_name_for_a_file(machine: dict[str, Any], on_gpu: bool, name: str) -> None:
    assert machines.machine_class(machine, on_gpu) == name


def test_a_case_that_breaks_fails_and_one_that_is_missing_cannot_be_compared() -> None:
    good, other = _case(weights_bytes=MIB), _case("m/y/train/cpu", weights_bytes=MIB)
    crashed = MeasuredCase(good.id, "crashed", "killed by SIGKILL", "apply")
    broke = judge(_measured(good, other), _measured(crashed, other), Tolerances())
    assert (broke.exit_code, broke.sentences()) == (1, ["m/x/train/cpu: crashed in apply: killed by SIGKILL"])
    missing = judge(_measured(good, other), _measured(good), Tolerances())
    assert (missing.exit_code, missing.sentences()) == (3, ["not measured now: m/y/train/cpu"])
    skipped = MeasuredCase(other.id, "skipped", "no CUDA device here")
    skips = judge(_measured(good, other), _measured(good, skipped), Tolerances())
    diverged = MeasuredCase(other.id, "diverged", "the loss became nan", "run", other.values)
    diverges = judge(_measured(good), _measured(good, diverged), Tolerances())
    assert diverges.sentences() == ["m/y/train/cpu: diverged in run: the loss became nan"]
    assert skips.exit_code == 3
    assert skips.sentences() == ["not measured now: m/y/train/cpu: skipped: no CUDA device here"]
    added = judge(_measured(good), _measured(good, other), Tolerances())
    assert (added.exit_code, added.added) == (0, ("m/y/train/cpu",))


def test_a_case_that_did_not_end_well_in_the_base_says_so_where_it_does_now() -> None:
    good = _case(weights_bytes=MIB)
    judgement = judge(
        _measured(MeasuredCase(good.id, "failed", "no such layer", "load")), _measured(good), Tolerances()
    )
    assert judgement.sentences() == ["nothing to compare with: m/x/train/cpu ended in some as failed: no such layer"]
    assert judgement.exit_code == 3


def test_a_machine_that_is_described_in_another_way_is_no_reason_to_give_up() -> None:
    odd: dict[str, Any] = {"cpu": 3, "packages": [], "gpus": [None, {"name": 4}], "memory_bytes": "much", "threads": {}}
    case = _case(weights_bytes=MIB)
    judgement = judge(_measured(case), _measured(case, **odd), Tolerances())
    assert [_verdict(judgement, "weights"), machines.machine_class(odd, on_gpu=True)] == ["same", "some-cores-cpu"]


def test_nothing_in_common_is_nothing_compared() -> None:
    assert judge(_measured(_case("a")), _measured(_case("b")), Tolerances()).exit_code == 3


def test_a_figure_that_the_base_has_and_that_is_not_known_now_is_not_judged() -> None:
    base, new = _case(disk_bytes=MIB, weights_bytes=MIB), _case(weights_bytes=MIB)
    new = dataclasses.replace(new, reasons={"disk_bytes": "the checkpoint was not saved"})
    judgement = _judged(base, new)
    assert judgement.exit_code == 3
    assert judgement.sentences() == [
        "not judged: disk of m/x/train/cpu: the new measurement does not have it: the checkpoint was not saved"
    ]


@pytest.mark.parametrize(
    ("base", "new", "verdicts"),
    [
        # What is worse by more than is tolerated, within that, and better by more than that.
        (None, None, ("regressed", "same", "better")),
        (None, "at least", ("regressed", "undecided", "undecided")),
        (None, "at most", ("undecided", "same", "better")),
        ("at least", None, ("undecided", "same", "better")),
        ("at least", "at least", ("regressed", "same", "better")),
        ("at least", "at most", ("undecided", "same", "better")),
        ("at most", None, ("regressed", "undecided", "undecided")),
        ("at most", "at least", ("regressed", "undecided", "undecided")),
        ("at most", "at most", ("regressed", "same", "better")),
    ],
)
def test_a_figure_of_which_a_bound_is_known_is_judged_by_what_that_proves(
    base: str | None, new: str | None, verdicts: tuple[str, str, str]
) -> None:
    def verdict(field: str, before: float, now: float, fail: str) -> str:
        earlier, later = (
            MeasuredCase("c", "ok", values={field: [value]}, bounds={field: bound} if bound else {})
            for value, bound in ((before, base), (now, new))
        )
        return _judged(earlier, later, fail).pairs[0].verdict

    sizes_mib = (110, 100.5, 90)
    assert verdicts == tuple(verdict("peak_live_bytes", 100 * MIB, mib * MIB, "peak_live:1%") for mib in sizes_mib)
    # Of what is better the higher it is, a lower bound is what an upper one is of the rest.
    opposite = {"at least": "at most", "at most": "at least", None: None}
    base, new = opposite[base], opposite[new]
    ratios = (90, 99.5, 110)
    assert verdicts == tuple(verdict("compression_ratio", 100, ratio, "compression_ratio:1") for ratio in ratios)


def test_an_undecided_bound_says_which_side_is_one() -> None:
    base, new = _case(peak_live_bytes=100 * MIB), _case(peak_live_bytes=150 * MIB)
    new = dataclasses.replace(new, bounds={"peak_live_bytes": "at most"})
    assert _judged(base, new).sentences() == [
        "undecided: m/x/train/cpu: peak_live 100.0 MiB → 150.0 MiB (+50.0%, tolerance 1%): of bounds: the new figure is"
        " at most this much"
    ]


def test_a_peak_is_laid_at_the_category_that_grew_and_weights_at_their_modules() -> None:
    def trained(optimizer_mib: int, layers: Sequence[Modules]) -> MeasuredCase:
        other_mib = 75 - optimizer_mib  # shrinks by as much: no cause of growth
        held = {"weights": 30 * MIB, "optimizer": optimizer_mib * MIB, "other": other_mib * MIB}
        parts = {"backward": {"weights": 30 * MIB}, "optimizer": held}
        peak = (30 + optimizer_mib) * MIB
        weights = sum(group.bytes for group in layers)
        case = _case(peak_live_bytes=peak, weights_bytes=weights)
        return dataclasses.replace(case, breakdown_bytes=parts, peak_part="optimizer", modules=layers)

    base = trained(60, [Modules("layers.*.mlp", 8, 8 * MIB)])
    new = trained(75, [Modules("layers.*.mlp", 7, 7 * MIB), Modules("layers.3.mlp", 1, 2 * MIB)])
    judgement = _judged(base, new)
    assert judgement.sentences() == [
        "regressed: m/x/train/cpu: weights 8.000 MiB → 9.000 MiB (+12.5%, tolerance 1%):"
        " +1.000 MiB weights of layers.3.mlp",
        "regressed: m/x/train/cpu: peak_live 90.00 MiB → 105.0 MiB (+16.7%, tolerance 1%):"
        " +15.00 MiB optimizer state (phase run, part optimizer)",
    ]
    all_of_them = _judged(base, trained(60, [Modules("layers.*.mlp", 8, 16 * MIB)]))
    assert "+8.000 MiB weights of layers.*.mlp (8 of them)" in all_of_them.sentences()[0]
    more = _judged(base, trained(60, [Modules("layers.*.mlp", 10, 10 * MIB)]))
    assert "+2.000 MiB weights of layers.*.mlp (10 of them, before 8)" in more.sentences()[0]


def test_a_peak_without_categories_is_told_apart_into_what_stays_and_what_is_taken_meanwhile() -> None:
    base = _case(weights_bytes=50 * MIB, held_live_bytes=51 * MIB, peak_live_bytes=100 * MIB)
    new = _case(weights_bytes=50 * MIB, held_live_bytes=51 * MIB, peak_live_bytes=120 * MIB)
    assert _judged(base, new).sentences() == [
        "regressed: m/x/train/cpu: peak_live 100.0 MiB → 120.0 MiB (+20.0%, tolerance 1%):"
        " +20.00 MiB memory that is taken meanwhile and given back (phase run)"
    ]


def test_what_stays_after_a_step_is_laid_at_the_states_of_the_optimizer_where_they_are_part_of_it() -> None:
    base = _case(held_live_bytes=100 * MIB, weights_bytes=40 * MIB, optimizer_state_bytes=40 * MIB)
    grown = _case(held_live_bytes=116 * MIB, weights_bytes=44 * MIB, optimizer_state_bytes=48 * MIB)
    causes = _change(_judged(base, grown), "held_live").causes
    assert [(cause.what, cause.amount) for cause in causes] == [
        ("optimizer", 8 * MIB), ("weights", 4 * MIB), ("held", 4 * MIB),
    ]  # fmt: skip
    elsewhere = _case(held_live_bytes=106 * MIB, weights_bytes=40 * MIB, optimizer_state_bytes=80 * MIB)
    causes = _change(_judged(base, elsewhere), "held_live").causes
    assert [(cause.what, cause.amount) for cause in causes] == [("held", 6 * MIB)]


def test_a_name_that_stands_for_something_else_now_is_told() -> None:
    two, three = (
        dataclasses.replace(
            _case(weights_bytes=MIB), stands_for={"workload": {"use": "train", "options": {"batch": n}}}
        )
        for n in (2, 3)
    )
    assert _judged(two, two).sentences() == []
    (line,) = _judged(two, three).sentences()
    assert line == (
        "m/x/train/cpu: its workload is not what it was: {'use': 'train', 'options': {'batch': 2}},"
        " now {'use': 'train', 'options': {'batch': 3}}"
    )


def test_words_of_a_worker_cannot_steer_the_terminal() -> None:
    bad = MeasuredCase("m/x/train/cpu", "failed", "evil \x1b[2J\n::error::", "apply")
    (line,) = judge(_measured(_case()), _measured(bad), Tolerances()).sentences()
    assert line == "m/x/train/cpu: failed in apply: evil \\x1b[2J\\n::error::"


def test_most_repeats_decide_how_a_case_ended() -> None:
    from membench.regression.measured import of_records

    records = [record for record in read_run(_KEPT).records if record.id == "trained-tiny/none/generate/cpu"]
    timed_out = dataclasses.replace(
        records[0], repeat=1, status="timeout", message="not done after 120 s", ended_in="run"
    )
    again = [dataclasses.replace(records[0], repeat=number) for number in (2, 3)]
    (case,) = of_records([*records, timed_out, *again], "r").cases.values()
    assert (case.status, case.message) == ("ok", "1 of 4 repeats ended as timeout: not done after 120 s")
    (case,) = of_records([*records, timed_out], "r").cases.values()
    assert (case.status, case.ended_in) == ("timeout", "run")


def test_a_run_that_was_kept_before_modules_were_is_compared_all_the_same() -> None:
    kept = of_run(read_run(_KEPT))
    judgement = judge(kept, kept, Tolerances())
    assert judgement.exit_code == 0
    assert {change.verdict for pair in judgement.pairs for change in pair.changes} == {"same"}
    assert len(judgement.pairs) == 13
