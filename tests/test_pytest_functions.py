"""The fixture ``membench``: functions of a user's tests, measured in real runs of pytest."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

import membench
from membench.host import scratch
from membench.pytest_plugin.keeping import Keeper
from membench.pytest_plugin.sharing import Sharing
from membench.records.disturbance import counted_durations_s
from membench.records.encoding import as_json
from membench.regression import sources
from tests import made_up

pytest_plugins = ["pytester"]

_MIB = 2**20

_BLOCK = """\
    import pytest

    def block(mib):
        return bytearray(b"\\1") * (mib * 2**20)
"""


def _kept(inner: pytest.Pytester) -> membench.Run:
    (path,) = (inner.path / "results").glob("pytest-*.jsonl")
    return membench.read_run(path)


def test_torch_that_a_function_imports_in_its_body_is_not_in_its_figures(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        def test_it(membench):
            def step():
                import torch
                return torch.ones(2**20)

            result = membench(step)
            assert "3.9 MiB" < result.peak_live < "6 MiB"
            assert result.warmup_time < "1 s"
        """
    )
    inner.runpytest_subprocess("-q").assert_outcomes(passed=1)


def test_a_function_is_measured_whatever_kind_it_is_of(inner: pytest.Pytester) -> None:
    inner.makeconftest("def twice(mib):\n    return 2 * mib\n")
    inner.makepyfile(
        f"""
{_BLOCK}
    from conftest import twice

    class Maker:
        def __init__(self, mib):
            self.mib = mib
        def make(self, *, times=1):
            return block(times * self.mib)

    def test_function(membench):
        result = membench(block, 32)
        assert "32 MiB" <= result.peak_live < "33 MiB"
        assert "32 MiB" <= result.held_live < "33 MiB"
        assert "31 MiB" < result.peak_footprint < "34 MiB"
        assert "10 us" < result.time < "10 s"
        assert (result.peak_live - result.held_live) < 2**20
        assert 1 <= result.peak_over_held < 1.05

    def test_lambda_of_what_is_let_go(membench):
        result = membench(lambda: len(block(twice(16))))
        assert result.peak_live > "31 MiB"
        assert result.held_live < "1 MiB"

    def test_closure_over_what_was_there_before(membench, tmp_path, monkeypatch):
        before, kept = block(48), []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOW_MANY", "8")
        def read():
            import os
            assert os.getcwd() == str(tmp_path)
            kept.append(block(int(os.environ["HOW_MANY"])))
            return before
        result = membench(read)
        # Twelve calls, six of them before the end of the phase in which memory is measured.
        assert "48 MiB" <= result.held_live < "49 MiB"
        assert kept == []

    def test_method_twice(membench):
        assert membench(Maker(4).make, times=4).peak_live > "15.9 MiB"
        assert membench(Maker(4).make).peak_live < "5 MiB"
"""
    )
    ran = inner.runpytest_subprocess("-q")
    ran.assert_outcomes(passed=4)
    ran.stdout.fnmatch_lines(["membench: 5 records kept in results/pytest-*.jsonl"])
    run = _kept(inner)
    assert [record.id.partition("::")[2] for record in run.records] == [
        "test_function", "test_lambda_of_what_is_let_go", "test_closure_over_what_was_there_before",
        "test_method_twice", "test_method_twice#2",
    ]  # fmt: skip
    assert [phase.name for phase in run.records[0].processes[0].phases] == ["warmup", "run", "time"]
    assert all(record.status == "ok" for record in run.records)


def test_a_failure_reads_like_any_other_of_pytests(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        f"""
{_BLOCK}
    import os, signal, threading

    class Ours(Exception):
        def __init__(self, first, second):
            super().__init__(first)
            self.second = second
        def __reduce__(self):
            return type(self), (self.args[0], self.second)

    def fails():
        raise Ours("a word", 2)

    def test_assertion(membench):
        assert membench(block, 32).peak_live < "16 MiB"

    @pytest.mark.membench(limit="16 MiB")
    def test_limit(membench):
        membench(block, 32)

    def test_exception(membench):
        with pytest.raises(Ours, match="a word") as raised:
            membench(fails)
        assert raised.value.second == 2
        membench(fails)

    def test_no_memory(membench):
        with pytest.raises(MemoryError):
            membench(lambda: bytearray(2**60))

    def test_crash(membench):
        membench(lambda: (print("the last words"), os.kill(os.getpid(), signal.SIGSEGV)))

    def test_exit(membench):
        with pytest.raises(SystemExit):
            membench(exit, 3)

    def test_skip(membench):
        membench(pytest.skip, "not today")

    def test_what_cannot_be_sent(membench):
        membench(block, threading.Lock())

    def test_what_does_nothing(membench):
        def generator():
            yield 1
        membench(generator)

    def test_unknown_figure(membench):
        result = membench(int)
        assert not hasattr(result, "peak_life")
        result.weights
"""
    )
    ran = inner.runpytest_subprocess("-q", "-rs", "-p", "no:benchmark")
    ran.assert_outcomes(passed=2, failed=7, skipped=1)
    out = ran.stdout.str()
    ran.stdout.fnmatch_lines(
        [
            '>       assert membench(block, 32).peak_live < "16 MiB"',
            "E       AssertionError: assert 32.* MiB < '16 MiB'",
            "E        +  where 32.* MiB = membench(block).peak_live",
            ">       membench(block, 32)",
            "E       Failed: *::test_limit: peak_live 32.* MiB is over its limit of 16.00 MiB",
            ">       membench(fails)",
            "E       *Ours: a word",
            "E       in the measured process:",
            'E         File "*test_a_failure_reads*.py", line *, in fails',
            'E           raise Ours("a word", 2)',
            "E       Failed: *::test_crash ended as crashed in phase warmup: killed by SIGSEGV",
            "the last words",
            "E       Failed: 'block' or an argument cannot be sent to a process of its own: TypeError: cannot pickle*",
            "E       Failed: 'test_what_does_nothing.<locals>.generator' does nothing when it is called; give*",
            "E       *MembenchError: weights of int is not known: a function has no such figure",
        ]
    )
    assert "pytest_plugin/fixture.py" not in out.partition("short test summary")[0]
    assert {record.id.partition("::")[2]: record.status for record in _kept(inner).records} == {
        "test_assertion": "ok", "test_limit": "ok", "test_exception": "failed", "test_exception#2": "failed",
        "test_no_memory": "out-of-memory", "test_crash": "crashed", "test_exit": "failed", "test_skip": "skipped",
        "test_unknown_figure": "ok",
    }  # fmt: skip


def test_a_wrong_marker_is_one_clear_line(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
    import pytest

    pytestmark = pytest.mark.membench(limit="1 GiB")

    @pytest.mark.membench(limt="1 GiB")
    def test_key(membench): ...

    @pytest.mark.membench(limit="1 Gb")
    def test_size(membench): ...

    @pytest.mark.membench(limit=2**30)
    def test_number(membench): ...

    @pytest.mark.membench(compare="2 percent")
    def test_share(membench): ...

    @pytest.mark.membench(device="2xcpu")
    def test_ranks(membench): ...

    @pytest.mark.membench("1 GiB")
    def test_place(membench): ...

    @pytest.mark.membench(limit="1 GiB")
    def test_without_the_fixture(): ...

    def test_module_marker_alone(): ...
"""
    )
    ran = inner.runpytest_subprocess("-q")
    ran.assert_outcomes(errors=7, passed=1)
    ran.stdout.fnmatch_lines(
        [
            "@pytest.mark.membench(limt='1 GiB'): unknown key 'limt'; did you mean 'limit'?",
            "@pytest.mark.membench(limit='1 Gb'): limit = '1 Gb': '1 Gb' is no size; write a number and B, KiB, MiB*",
            "@pytest.mark.membench(limit=1073741824): limit = 1073741824: write a size with its unit, such as '1 GiB'",
            "@pytest.mark.membench(compare='2 percent'): compare = '2 percent': write a share such as '2%', a size*",
            "@pytest.mark.membench(device='2xcpu'): device = '2xcpu': a function runs on one device: write cpu, cuda*",
            "@pytest.mark.membench('1 GiB'): it takes no values without a name; known: limit, compare, device, repeats",
            "@pytest.mark.membench: the test does not use the fixture 'membench', so nothing would be held against*",
        ]
    )
    assert "Traceback" not in ran.stdout.str()
    assert not (inner.path / "results").exists()


_TIMED = f"""\
{_BLOCK}
    import time

    def wait(s):
        time.sleep(s)

    def test_timed(membench):
        membench(wait, 0.02)

    @pytest.mark.benchmark(group="mine")
    def test_own_benchmark_as_well(membench, benchmark):
        membench(block, 1)
        benchmark(int)

    def test_broken(membench):
        with pytest.raises(ZeroDivisionError):
            membench(lambda: 1 / 0)

    def test_plain():
        pass
"""


def test_times_go_to_pytest_benchmark_by_the_measured_processs_own_clock(inner: pytest.Pytester) -> None:
    inner.makepyfile(_TIMED)
    ran = inner.runpytest_subprocess("-q", "-W", "error", "--benchmark-only", "--benchmark-json=times.json")
    ran.assert_outcomes(passed=3, skipped=1)
    ran.stdout.fnmatch_lines(["test_timed *"])
    written = json.loads((inner.path / "times.json").read_text())["benchmarks"]
    timed, own = sorted(written, key=lambda each: each["name"] != "test_timed")
    record = _kept(inner).records[0]
    # All of them, but for those that other tests disturbed.
    assert timed["stats"]["data"] == counted_durations_s(record.processes[0])
    assert len(record.processes[0].durations_s or ()) == record.settings["measured_steps"]
    # Of twelve calls and the way to another process nothing but one call is in a time.
    assert 0.02 <= timed["stats"]["min"] < 0.04
    assert timed["options"]["timer"] == "membench_worker_clock"
    assert timed["extra_info"]["peak_live_bytes"] == record.metrics["peak_live_bytes"]
    assert (own["name"], own["group"]) == ("test_own_benchmark_as_well", "mine")
    assert own["options"]["timer"] == "perf_counter"


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        (["--benchmark-skip"], {"passed": 1, "skipped": 3}),
        (["--benchmark-disable"], {"passed": 4}),
    ],
)
def test_pytest_benchmarks_switches_mean_what_they_mean_there(
    inner: pytest.Pytester, options: Sequence[str], outcomes: dict[str, int]
) -> None:
    inner.makepyfile(_TIMED)
    ran = inner.runpytest_subprocess("-q", *options)
    ran.assert_outcomes(**outcomes)
    assert "Name (time in" not in ran.stdout.str()


def test_what_grew_since_a_baseline_fails(inner: pytest.Pytester) -> None:
    source = """
    import pytest

    def block(mib):
        return bytearray(b"\\1") * (mib * 2**20)

    @pytest.mark.membench(compare="1%")
    def test_close(membench):
        membench(block, 32)

    @pytest.mark.membench(compare="50%")
    def test_wide(membench):
        membench(block, 32)
"""
    watch_no_time = ["-q", "--membench-fail", "time:off"]
    inner.makepyfile(test_it=source)
    inner.runpytest_subprocess("-q", "--membench-save=before").assert_outcomes(passed=2)
    assert sources.load("before", inner.path / "results").cases.keys() == {
        "test_it.py::test_close", "test_it.py::test_wide",
    }  # fmt: skip
    inner.makepyfile(test_it=source.replace("32", "40"))
    ran = inner.runpytest_subprocess(*watch_no_time, "--membench-compare=before")
    ran.assert_outcomes(passed=1, failed=1)
    ran.stdout.fnmatch_lines(
        [
            ">       membench(block, 40)",
            "E       Failed: regressed since before: test_it.py::test_close: peak_live 32.* MiB → 40.* MiB (+25.0%,*",
        ]
    )
    # What looked worse was measured three times more before it was called so.
    ran.stdout.fnmatch_lines(["membench: 5 records kept in *"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--membench-compare=nothing"], "membench: no baseline and no run is named 'nothing' in *"),
        (["--membench-save=../x"], "membench: '../x' is no name for a baseline: *"),
        (
            ["--membench-fail=time:1%"],
            "membench: --membench-fail says how much worse figures may get: add --*",
        ),
        (
            ["--membench-compare", "--membench-fail=peak_life:1%"],
            "membench: --membench-fail 'peak_life:1%': no metric is named 'peak_life'; did you mean 'peak_live'?",
        ),
        (
            ["--membench-compare", "test_it.py"],
            "*: 'test_it.py' is a test and no baseline; write the option after it*",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_line(inner: pytest.Pytester, options: Sequence[str], said: str) -> None:
    inner.makepyfile(test_it="def test(): ...")
    ran = inner.runpytest_subprocess(*options)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines([f"*{said}"])
    assert "Traceback" not in ran.stderr.str()


@pytest.mark.parametrize("what", ["file", "removed", "moved"])
def test_where_results_cannot_be_kept_tests_measure_and_judge_with_one_warning(
    inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "file":
        (inner.path / "results").write_text("no folder")
    kept = inner.mkdir("temporary")
    monkeypatch.setenv("TMPDIR", str(kept))
    inner.makepyfile(
        f"""
        import os, pytest, shutil
        def test_one(membench):
            assert membench(bytearray, 2**20).held_live > "0.9 MiB"
        def test_two():
            if {what!r} == "removed":
                shutil.rmtree("results")
            if {what!r} == "moved":
                os.rename("results", {str(kept / "membench-kept-here")!r})
        def test_three(membench):
            membench(int)
        @pytest.mark.membench(limit="1 KiB")
        def test_four(membench):
            membench(bytearray, 2**20)
        """
    )
    ran = inner.runpytest_subprocess("-q", "-p", "no:benchmark")
    ran.assert_outcomes(passed=3, failed=1, warnings=1)
    ran.stdout.fnmatch_lines(["*membench: *results*kept*", "membench: 3 records kept in *temporary/membench-kept-*"])
    (path,) = kept.glob("membench-kept-*/*.jsonl")
    assert [record.status for record in membench.read_run(path).records] == ["ok"] * 3


def test_a_record_that_cannot_be_kept_is_left_out_with_a_warning_and_the_next_ones_are_kept(
    inner: pytest.Pytester,
) -> None:
    warned: list[str] = []

    class Warned:
        def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
            warned.append(str(warning_message.message))

    config = inner.parseconfigure(f"--membench-output={inner.path}")
    config.pluginmanager.register(Warned())
    keeper = Keeper(config)
    record = as_json(made_up.record("none", weights_bytes=4))
    for each in (record, {**record, "id": "../x", "case": {**record["case"], "model_plugin": {}}}, record):
        keeper.keep([{"header": {"run": "r", "suite": "s"}, "record": each}])
    keeper.finish()
    config._ensure_unconfigure()
    assert [kept.repeat for kept in membench.read_run(inner.path / "r.jsonl").records] == [0, 1]
    (warning,) = warned
    assert "the record of ../x cannot be kept" in warning


def test_results_are_kept_in_the_folder_that_is_named(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_one(membench):\n    membench(int)\n")
    inner.runpytest_subprocess("-q", "--membench-output=a/b", "--membench-save=x").assert_outcomes(passed=1)
    assert [path.suffix for path in sorted((inner.path / "a/b").iterdir())] == ["", ".jsonl"]
    assert not (inner.path / "results").exists()
    ran = inner.runpytest_subprocess("-q", "--membench-output=a/b", "--membench-compare=x")
    ran.assert_outcomes(passed=1)
    (inner.path / "setup.cfg").touch()
    ran = inner.runpytest_subprocess("--membench-output", "setup.cfg")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    ran.stderr.fnmatch_lines(["*--membench-output: 'setup.cfg' is not a folder"])
    assert "--membench-output=FOLDER" in inner.runpytest_subprocess("--help").stdout.str()


def test_timings_are_taken_one_at_a_time_and_memory_in_parallel(
    inner: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of xdist; each function notes when it was called, and at first waits until the other is there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    inner.makepyfile(
        """
    import pathlib, time
    import pytest

    calls = []

    def note(name, other, folder):
        began = time.monotonic()
        (folder / f"{name}.there").touch()
        while not (folder / f"{other}.there").exists():
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        time.sleep(0.05)
        calls.append((began, time.monotonic()))
        (folder / f"{name}.calls").write_text(repr(calls))

    @pytest.mark.parametrize(("name", "other"), [("a", "b"), ("b", "a")])
    def test_it(membench, name, other):
        membench(lambda: note(name, other, pathlib.Path.cwd()))
"""
    )
    inner.runpytest_subprocess("-q", "-n2").assert_outcomes(passed=2)
    a, b = (eval((inner.path / f"{name}.calls").read_text()) for name in "ab")
    assert len(a) == len(b) == 12
    timed = 6  # those after the warm-up and five calls for memory
    for ours, others in ((a, b), (b, a)):
        began, ended = ours[timed][0], ours[-1][1]
        assert not [call for call in others if call[0] < ended and call[1] > began]
    assert any(first[0] < second[1] and second[0] < first[1] for first, second in product(a[:timed], b[:timed]))
    assert len(_kept(inner).records) == 2
    assert not list(tmp_path.glob("membench-*"))  # what they shared is gone


def test_nothing_is_loaded_where_nothing_is_measured(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
    import sys

    def test_it():
        heavy = {"torch", "numpy", "pydantic", "rich", "psutil", "filelock", "cloudpickle", "tomllib"}
        assert not heavy & set(sys.modules)
        ours = {name.removeprefix("membench.") for name in sys.modules if name.startswith("membench.")}
        assert ours <= {"pytest_plugin", "pytest_plugin.entries", "pytest_plugin.timing"}
"""
    )
    inner.runpytest_subprocess("-q", "-p", "no:xdist", "-p", "no:anyio").assert_outcomes(passed=1)
    inner.runpytest_subprocess("-q", "-p", "no:xdist", "-p", "no:anyio", "-p", "no:benchmark").assert_outcomes(passed=1)


def _worker(number: int, workers: int, tmp_path: Path) -> Sharing:
    from datetime import UTC, datetime

    return Sharing(tmp_path, tmp_path, datetime.now(UTC), True, number, workers)


def test_what_workers_share_is_no_leftover_while_one_of_them_lives(tmp_path: Path) -> None:
    """Also to a runner in another container, which sees the folder and not the process that it is named after."""
    folder = tmp_path / f"membench-{2**30}-pytest_0"
    hold = (
        "import sys, datetime, pathlib; from membench.pytest_plugin.sharing import Sharing\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "sharing = Sharing(folder, folder, datetime.datetime.now(), True, 0, 1)\n"
        "sharing.new_file('x').touch(); print('there', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        scratch.sweep(tmp_path)
        assert list(folder.glob("x-*"))
        worker.communicate()
    scratch.sweep(tmp_path)
    assert not folder.exists()


def test_gpus_are_shared_out_one_a_worker(tmp_path: Path) -> None:
    gpus = ["GPU-a", "GPU-b"]
    shown = [_worker(number, 2, tmp_path).gpu_among(gpus).variables for number in range(2)]
    assert shown == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]
    # A suite that says which device it means has its way, and one worker alone sees all.
    assert _worker(1, 2, tmp_path).gpu(["cuda:1"]).variables == {}
    assert _worker(1, 2, tmp_path).gpu(["cpu"]).variables == {}
    assert _worker(0, 1, tmp_path).gpu_among([]).variables == {}


def test_workers_that_share_a_gpu_have_it_in_turn(tmp_path: Path) -> None:
    import filelock

    first, third = (_worker(number, 3, tmp_path).gpu_among(["GPU-a", "GPU-b"]) for number in (0, 2))
    assert first.variables == third.variables
    with first.held:
        assert isinstance(third.held, filelock.BaseFileLock)
        with pytest.raises(filelock.Timeout):
            third.held.acquire(timeout=0)
    with third.held:
        pass
