"""``--membench-compare``, ``--membench-fail`` and ``--membench-save`` in real runs of pytest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

import membench
from membench.regression import sources
from membench.regression.measured import Measured

pytest_plugins = ["pytester"]

_EXIT_USAGE = pytest.ExitCode.USAGE_ERROR

_WAITS = """
import time
import pytest

@pytest.mark.membench(repeats=REPEATS)
def test_waiting(membench):
    membench(time.sleep, SECONDS)
"""

_TWO = """
def test_first(membench):
    membench(bytearray, 2**20)

def test_second(membench):
    membench(bytearray, 2**20)
"""


def _waits(seconds: float, repeats: int = 1) -> str:
    return _WAITS.replace("SECONDS", str(seconds)).replace("REPEATS", str(repeats))


def _saved(inner: pytest.Pytester, source: str, *arguments: str) -> None:
    inner.makepyfile(test_it=source)
    assert inner.runpytest_subprocess("-q", "--membench-save=before", *arguments).ret == 0


def _before(inner: pytest.Pytester) -> Measured:
    return sources.load("before", inner.path / "results")


@pytest.fixture(scope="module")
def baseline_of_two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A baseline of two functions, saved once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "test_it.py").write_text(_TWO)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:xdist", "--membench-save=before"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return (folder / "results" / "baselines" / "before.json").read_text()


@pytest.fixture
def of_two(inner: pytest.Pytester, baseline_of_two: str) -> pytest.Pytester:
    """A folder with those two functions and their baseline."""
    inner.makepyfile(test_it=_TWO)
    path = inner.mkdir("results") / "baselines" / "before.json"
    path.parent.mkdir()
    path.write_text(baseline_of_two)
    return inner


def test_what_cannot_be_told_from_chance_is_warned_of_with_its_reason(inner: pytest.Pytester) -> None:
    _saved(inner, _waits(0.02))
    inner.makepyfile(test_it=_waits(0.04))
    ran = inner.runpytest_subprocess("-q", "--membench-compare=before")
    ran.assert_outcomes(passed=1, warnings=1)
    ran.stdout.fnmatch_lines(
        ["*MembenchWarning: undecided since before: test_it.py::test_waiting: time 2* ms → 4* ms (+*: *"]
    )
    # Of a figure that was asked for by name the remedy is said, too.
    asked = inner.runpytest_subprocess("-q", "--membench-compare=before", "--membench-fail=time:10%")
    asked.assert_outcomes(passed=1, warnings=2)
    asked.stdout.fnmatch_lines(
        ["*MembenchWarning: test_it.py::test_waiting: time cannot be judged: before has it from 1 repeat, and 3 tell;*"]
    )


def test_time_that_was_measured_three_times_fails_if_it_grows(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_it=_waits(0.05, repeats=3))
    saved = inner.runpytest_subprocess("-q", "--membench-save=before", "-p", "no:benchmark")
    saved.stdout.fnmatch_lines(["membench: 3 records kept in *"])
    assert len(_before(inner).cases["test_it.py::test_waiting"].values["step_median_s"]) == 3
    asked = ["-q", "--membench-compare=before", "--membench-fail=time:10%", "-p", "no:benchmark"]
    inner.runpytest_subprocess(*asked).assert_outcomes(passed=1)
    inner.makepyfile(test_it=_waits(0.075, repeats=3))
    slower = inner.runpytest_subprocess(*asked)
    slower.assert_outcomes(failed=1)
    slower.stdout.fnmatch_lines(["E * regressed since before: test_it.py::test_waiting: time 5* ms → 7* ms (+*"])


def test_figures_of_a_function_are_medians_over_its_repeats_and_every_repeat_is_held_to_its_limit(
    inner: pytest.Pytester,
) -> None:
    inner.makepyfile(
        """
import pathlib, pytest

def grows(path):
    # 8, 24 and 16 MiB: of each repeat, the same in its twelve calls.
    number = len(path.read_text().split()) // 12
    path.write_text(path.read_text() + "x ")
    return bytearray(b"1") * ([8, 24, 16][number] * 2**20)

@pytest.mark.membench(repeats=3)
def test_median(membench, tmp_path):
    path = tmp_path / "calls"
    path.write_text("")
    result = membench(grows, path)
    assert "16 MiB" <= result.peak_live < "17 MiB"
    assert len(result.records) == 3

@pytest.mark.membench(repeats=3, limit="20 MiB")
def test_limit(membench, tmp_path):
    path = tmp_path / "calls"
    path.write_text("")
    membench(grows, path)

@pytest.mark.membench(repeats=0)
def test_wrong(membench): ...
"""
    )
    ran = inner.runpytest_subprocess("-q", "-p", "no:benchmark")
    ran.assert_outcomes(passed=1, failed=1, errors=1)
    ran.stdout.fnmatch_lines(
        [
            "@pytest.mark.membench(repeats=0): repeats = 0: write a whole number from 1 to 100",
            "E * *::test_limit: peak_live 24.* MiB is over its limit of 20.00 MiB",
        ]
    )


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
def test_a_comparison_in_which_nothing_is_compared_is_refused(of_two: pytest.Pytester, workers: Sequence[str]) -> None:
    of_two.makepyfile(test_it="def test_renamed(membench):\n    membench(int)\n")
    ran = of_two.runpytest_subprocess("-q", "--membench-compare=before", *workers)
    ran.assert_outcomes(passed=1)
    assert ran.ret == _EXIT_USAGE
    ran.stdout.fnmatch_lines(
        [
            "membench: nothing was compared: before has none of what was measured (test_it.py::test_renamed);"
            " it has test_it.py::test_first, test_it.py::test_second"
        ]
    )


def test_cases_that_are_new_beside_others_are_named_and_pass(of_two: pytest.Pytester) -> None:
    of_two.makepyfile(test_it=_TWO.replace("second", "third"))
    ran = of_two.runpytest_subprocess("-q", "--membench-compare=before")
    ran.assert_outcomes(passed=2)
    assert ran.ret == 0
    ran.stdout.fnmatch_lines(["membench: not in before, so held against nothing: test_it.py::test_third"])


def test_a_tolerance_that_fits_nothing_that_ran_is_refused(of_two: pytest.Pytester) -> None:
    fits = "--membench-fail=*::test_first:peak_live:5%"
    ran = of_two.runpytest_subprocess(
        "-q", "--membench-compare=before", fits, "--membench-fail=*::test_frist:peak_live:5%"
    )
    ran.assert_outcomes(passed=2)
    assert ran.ret == _EXIT_USAGE
    ran.stdout.fnmatch_lines(
        ["membench: --membench-fail: tolerance '[*]::test_frist:peak_live:5%' fits no case; did you mean*test_first'?"]
    )


_METRIC = """
from membench.plugins import QualityMetric

class Told(QualityMetric):
    unit = "nats"

    def measure(self, module, held_out, context):
        with open("figure.txt") as file:
            return float(file.read())
"""

_WITH_METRIC = """
[suite]
name = "own"
metrics = ["told"]
[matrix]
model = ["tiny"]
technique = ["none"]
workload = ["forward"]
[model.tiny]
use = "factory"
function = "membench.testing:tiny_module"
[settings]
measured_steps = 1
"""


def test_a_tolerance_may_be_of_a_metric_that_a_suites_plug_in_measures(inner: pytest.Pytester) -> None:
    inner.makepyfile(membench_plugins=_METRIC)
    inner.makefile(".toml", own=_WITH_METRIC)
    figure = inner.path / "figure.txt"
    figure.write_text("1.0")
    assert inner.runpytest_subprocess("own.toml", "-q", "--membench-save=before").ret == 0
    figure.write_text("1.3")
    asked = ["own.toml", "-q", "-p", "no:benchmark", "--membench-compare=before"]
    grown = inner.runpytest_subprocess(*asked, "--membench-fail=told:0.1")
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(["regressed since before: *: told 1.000 nats → 1.300 nats (+0.300 nats, tolerance 0.1*"])

    said = "membench: --membench-fail 'tolt:1': no metric is named 'tolt'; did you mean 'told'?"
    wrong = inner.runpytest_subprocess(*asked, "--membench-fail=tolt:1")
    assert (wrong.ret, wrong.errlines[0]) == (_EXIT_USAGE, f"ERROR: {said}")
    assert "membench:" not in wrong.stdout.str()  # nothing was measured, nor looked at
    # What workers collect is known to them alone: the last word is said when they are done.
    wrong_there = inner.runpytest_subprocess(*asked, "-n1", "--membench-fail=told:1", "--membench-fail=tolt:1")
    assert wrong_there.ret == _EXIT_USAGE
    wrong_there.stdout.fnmatch_lines([said])


def test_a_comparison_of_tests_that_measure_nothing_says_so(of_two: pytest.Pytester) -> None:
    of_two.makepyfile(test_it="def test_plain(): ...\n")
    ran = of_two.runpytest_subprocess("-q", "--membench-compare=before")
    assert ran.ret == 0
    ran.stdout.fnmatch_lines(["membench: nothing was compared: no test measured anything"])
    asked = of_two.runpytest_subprocess("-q", "--membench-compare=before", "--membench-fail=time:10%")
    assert asked.ret == _EXIT_USAGE
    listed = of_two.runpytest_subprocess("-q", "--membench-compare=before", "--collect-only")
    listed.stdout.no_fnmatch_line("membench:*")


def test_tolerances_without_a_base_are_refused_with_workers_too(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(): ...\n")
    ran = inner.runpytest_subprocess("-n2", "--membench-fail=time:1%")
    assert ran.ret == _EXIT_USAGE
    ran.stderr.fnmatch_lines(["*membench: --membench-fail says how much worse figures may get: add --membench-compare"])


def test_a_test_that_is_run_again_keeps_what_it_measured_each_time(inner: pytest.Pytester) -> None:
    """As pytest-rerunfailures does it: the protocol of the same item once more, with its reports."""
    inner.makeconftest(
        """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    for attempt in range(2):
        item._initrequest()
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            if report.failed and attempt == 0:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
    return True
"""
    )
    inner.makepyfile(
        test_it="""
import os, pathlib

def flaky(path):
    if not path.exists():
        path.touch()
        os.abort()

def test_flaky(membench):
    membench(flaky, pathlib.Path("was-here").absolute())
    membench(int)
"""
    )
    ran = inner.runpytest_subprocess("-q", "-p", "no:benchmark", "--membench-save=before")
    ran.stdout.fnmatch_lines(["membench: 3 records kept in *"])
    (path,) = (inner.path / "results").glob("pytest-*.jsonl")
    records = membench.read_run(path).records
    assert [(record.id.partition("::")[2], record.repeat, record.status) for record in records] == [
        ("test_flaky", 0, "crashed"), ("test_flaky", 1, "ok"), ("test_flaky#2", 0, "ok"),
    ]  # fmt: skip
    # What counts to pytest is how it ended at last.
    assert {id: case.status for id, case in _before(inner).cases.items()} == {
        "test_it.py::test_flaky": "ok", "test_it.py::test_flaky#2": "ok",
    }  # fmt: skip


_SUITE = """\
[suite]
name = "same"
[matrix]
model = ["some"]
technique = ["none"]
workload = ["still"]
[model.some]
use = "ballast"
mib = MIB
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
"""


def test_suites_of_one_name_are_kept_apart(inner: pytest.Pytester) -> None:
    for mib in (1, 2):
        (inner.mkdir(f"of-{mib}") / "suite.toml").write_text(_SUITE.replace("MIB", str(mib)))
    both = ["of-1", "of-2", "-q", "-p", "no:benchmark"]
    ran = inner.runpytest_subprocess(*both, "-n2")
    ran.assert_outcomes(passed=2)
    runs = [membench.read_run(path) for path in (inner.path / "results").glob("same-*.jsonl")]
    assert {run.records[0].metrics["weights_bytes"] for run in runs} == {2**20, 2**21}
    # A baseline goes by the suite's name: one would stand for both.
    for option in ("--membench-save", "--membench-compare"):
        refused = inner.runpytest_subprocess(*both, option)
        assert refused.ret == pytest.ExitCode.INTERRUPTED
        refused.stdout.fnmatch_lines(
            [f"of-1/suite.toml and of-2/suite.toml are both named 'same', and {option} goes by that: give one of*"]
        )


def test_functions_on_several_devices_go_into_one_file_that_can_be_read(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
import pytest

def test_here(membench):
    membench(int)

@pytest.mark.membench(device="cuda")
def test_there(membench):
    membench(int)
"""
    )
    inner.runpytest_subprocess("-q")
    (path,) = (inner.path / "results").glob("pytest-*.jsonl")
    assert [record.case["device"] for record in membench.read_run(path).records] == ["cpu", "cuda"]


def test_saving_keeps_what_was_not_measured_this_time(of_two: pytest.Pytester) -> None:
    kept = _before(of_two)
    of_two.makepyfile(test_it=_TWO.replace("2**20", "2**21"))
    ran = of_two.runpytest_subprocess("-q", "-k", "second", "--membench-save=before")
    ran.stdout.fnmatch_lines(["membench: saved as baseline *before.json: 1 case as measured now, beside 1 case as*"])
    now = _before(of_two)
    assert now.cases["test_it.py::test_first"] == kept.cases["test_it.py::test_first"]
    (held_bytes,) = now.cases["test_it.py::test_second"].values["held_live_bytes"]
    assert held_bytes > 2**21 - 2**16


def test_saving_keeps_the_figures_of_a_case_that_ends_badly_this_time(of_two: pytest.Pytester) -> None:
    of_two.makepyfile(test_it=_TWO.replace("membench(bytearray, 2**20)", "import os; membench(os.abort)"))
    ran = of_two.runpytest_subprocess("-q", "--membench-save=before")
    ran.assert_outcomes(failed=2)
    ran.stdout.fnmatch_lines(["membench: saved as baseline *: 0 cases as measured now, beside 2 cases as before"])
    assert {case.status for case in _before(of_two).cases.values()} == {"ok"}


def test_saving_beside_figures_of_another_machine_is_refused(of_two: pytest.Pytester) -> None:
    path = of_two.path / "results" / "baselines" / "before.json"
    other = re.sub(r'"page_bytes": \d+', '"page_bytes": 1', path.read_text())
    path.write_text(other)
    ran = of_two.runpytest_subprocess("-q", "-k", "second", "--membench-save=before")
    assert ran.ret == 2
    ran.stdout.fnmatch_lines(
        ["membench: not saved as a baseline: *before.json: 1 case of it would stay, and is of another machine (page_*"]
    )
    assert path.read_text() == other
    # With all of them measured anew nothing of the other machine stays.
    assert of_two.runpytest_subprocess("-q", "--membench-save=before").ret == 0
    assert path.read_text() != other
