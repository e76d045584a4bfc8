"""Programs of a user's own, measured as they are, and the phases that they mark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

import membench
from membench import cli
from membench.errors import SuiteError
from membench.protocol.readings import plain
from membench.records.record import Record
from membench.running.derived_metrics import resolution_bytes

_MIB = 2**20

_TRAIN = """\
import json, os, sys
import membench

print(json.dumps([sys.argv, sys.path[0], os.getcwd(), {**os.environ}, __name__]))
with membench.phase("load"):
    held = bytearray(b"1") * (64 * 2**20)


@membench.phase("step")
def step():
    bytearray(b"1") * (128 * 2**20)


with membench.phase("train"):
    for _ in range(3):
        step()
del held
print("done", file=sys.stderr)
"""


class Ran(NamedTuple):
    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def record(self) -> Record:
        return newest(self.folder)


def newest(folder: Path) -> Record:
    return membench.read_run(membench.newest_run(folder / "results")).records[-1]


def membench_run(folder: Path, *words: str, **others: Any) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "membench", "run", *words], cwd=folder, capture_output=True, text=True, **others
    )
    return Ran(folder, done)


def phases_of(record: Record) -> Mapping[str, Mapping[str, Any]]:
    """What is known of each phase."""
    return {phase.name: plain(phase) for phase in record.processes[0].phases}


def measured(folder: Path, text: str, **tables: Any) -> Record:
    """The record of a program of this text."""
    path = folder / "own.py"
    path.write_text(text)
    suite = membench.Suite("own", script={"file": str(path)}, **tables)
    return membench.run(suite, output=folder / "results").records[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.py").write_text(_TRAIN)
    return membench_run(folder, "--script", "train.py", "--", "--epochs", "3")


def test_a_script_runs_as_its_user_would_run_it(trained: Ran) -> None:
    plainly = subprocess.run(
        [sys.executable, "train.py", "--epochs", "3"], cwd=trained.folder, capture_output=True, text=True, check=True
    )
    argv, path, folder, environment, name = json.loads(trained.done.stdout.splitlines()[0])
    assert environment.pop("MEMBENCH_PHASES")
    theirs = json.loads(plainly.stdout.splitlines()[0])
    for variables in (environment, theirs[3]):
        variables.pop("PYTEST_CURRENT_TEST")
    assert [argv, path, folder, environment, name] == theirs


def test_what_a_script_writes_goes_through_and_the_table_follows(trained: Ran) -> None:
    assert trained.done.returncode == 0
    assert trained.done.stderr == "done\n"
    assert "\ntrain/none/script/cpu · ok\n\nphase       allocator" in trained.done.stdout
    assert "\ntrain · script · cpu\n\ntechnique    status    footprint peak    time\n" in trained.done.stdout


def test_each_phase_has_the_peak_of_what_it_did(trained: Ran) -> None:
    phases = phases_of(trained.record)
    assert list(phases) == ["script", "load", "train", "train.step"]
    before = phases["load"]["peak_footprint_bytes"] - 64 * _MIB
    assert 0 < before < 40 * _MIB  # of the interpreter
    for name, mib in (("train", 192), ("train.step", 192), ("script", 192)):
        assert phases[name]["peak_footprint_bytes"] - mib * _MIB == pytest.approx(before, abs=_MIB + resolution_bytes())
        assert "bound" not in phases[name]


def test_a_phase_that_comes_again_is_added_up_and_lies_within_the_outer_one(trained: Ran) -> None:
    phases = phases_of(trained.record)
    assert [phases[name]["passes"] for name in phases] == [1, 1, 1, 3]
    assert 0 < phases["train.step"]["duration_s"] <= phases["train"]["duration_s"] <= phases["script"]["duration_s"]


def test_the_record_says_what_is_known_and_why_the_rest_is_not(trained: Ran) -> None:
    record = trained.record
    assert (record.id, record.status, record.processes[0].exit_code) == ("train/none/script/cpu", "ok", 0)
    assert record.case["model_plugin"] == {
        "use": "script", "options": {"file": "train.py", "arguments": ["--epochs", "3"]}
    }  # fmt: skip
    assert record.metrics["peak_footprint_bytes"] == phases_of(record)["script"]["peak_footprint_bytes"]
    assert record.metrics["step_median_s"] == pytest.approx(phases_of(record)["script"]["duration_s"], abs=0.5)
    assert record.metrics["peak_live_bytes"] is None
    assert "keeps its own allocator" in record.reasons["peak_live_bytes"]
    assert "peak_over_held_ratio" not in record.metrics
    assert record.obtained["peak_footprint_bytes"]["bound"] == "exact"
    assert record.machine["threads"] is None


def test_verbs_read_a_scripts_run_like_any_other(trained: Ran, tmp_path: Path) -> None:
    def verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "membench", *words], cwd=trained.folder, capture_output=True, text=True
        )

    name = membench.newest_run(trained.folder / "results").stem
    assert "train.step" in verb("show", "--phases").stdout
    assert (
        "train · script · cpu"
        in verb("report", f"results/{name}.jsonl", "-o", str(tmp_path / "r.md")).stderr
        + (tmp_path / "r.md").read_text()
    )
    same = verb("check", name, "--against", name)
    assert (same.returncode, same.stderr) == (0, "")
    assert "nothing regressed; 2 figures of 1 cases watched" in same.stdout


def test_whoever_keeps_a_single_run_is_told_how_times_can_be_judged(
    trained: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(membench.newest_run(trained.folder / "results"))
    assert cli.main(["baseline", "save", "--run", run, "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "times were measured less than 3 times: none will be called slower than these; --repeats 3 tells"
    )


def test_more_memory_than_before_has_regressed(trained: Ran, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(_TRAIN.replace("128", "160"))
    assert membench_run(tmp_path, "--script", "train.py").done.returncode == 0
    base, now = (membench.newest_run(folder / "results") for folder in (trained.folder, tmp_path))
    checked = subprocess.run(
        [sys.executable, "-m", "membench", "check", str(now), "--against", str(base)], capture_output=True, text=True
    )
    assert checked.returncode == 1
    assert "regressed: train/none/script/cpu: peak_footprint" in checked.stdout


@pytest.mark.parametrize(
    ("text", "status", "ended_in", "message"),
    [
        ("import membench\nwith membench.phase('a'), membench.phase('b'):\n    raise ValueError('boom')",
         "failed", "a.b", "ended with exit code 1: ValueError: boom"),
        ("import membench\ntry:\n    with membench.phase('a'):\n        raise ValueError\nexcept ValueError:\n"
         "    raise KeyError('later') from None", "failed", "script", "ended with exit code 1: KeyError: 'later'"),
        ("raise SystemExit(3)", "failed", "script", "ended with exit code 3"),
        ("import membench, os\nwith membench.phase('a'):\n    os.kill(os.getpid(), 11)",
         "crashed", "a", "killed by SIGSEGV"),
        ("import sys\nprint('first\\nlast\\n', file=sys.stderr)\nraise MemoryError",
         "out-of-memory", "script", "ended with exit code 1: MemoryError"),
        ("import atexit, sys\natexit.register(print, 'wandb: synced', file=sys.stderr)\nraise MemoryError('no room')",
         "out-of-memory", "script", "ended with exit code 1: MemoryError: no room"),
        ("import sys\nsys.exit('torch.OutOfMemoryError: CUDA out of memory.\\n' + '=' * 60)",
         "out-of-memory", "script", "ended with exit code 1: torch.OutOfMemoryError: CUDA out of memory."),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'raise MemoryError(1)'], check=True)",
         "out-of-memory", "script", "ended with exit code 1: MemoryError: 1"),
    ],
)  # fmt: skip
def test_how_a_script_ends_is_its_status_with_phase_and_last_words(
    tmp_path: Path, text: str, status: str, ended_in: str, message: str
) -> None:
    record = measured(tmp_path, text)
    assert (record.status, record.ended_in, record.message) == (status, ended_in, message)
    assert record.metrics["peak_footprint_bytes"] is not None
    assert record.reasons["step_median_s"] == f"the case ended as {status}"


@pytest.mark.parametrize(
    ("child", "bound"), [("", "exact"), ("import os\nif not os.fork(): os._exit(0)\nos.wait()\n", "at least")]
)
def test_the_smallest_program_has_a_peak_of_its_own_without_what_it_was_started_from(
    tmp_path: Path, child: str, bound: str
) -> None:
    own = tmp_path / "peak"
    record = measured(tmp_path, f"{child}open({str(own)!r}, 'w').write(open('/proc/self/status').read())")
    (peak_kib,) = (int(line.split()[1]) for line in own.read_text().splitlines() if line.startswith("VmHWM:"))
    assert record.metrics["peak_footprint_bytes"] == pytest.approx(peak_kib * 1024, abs=resolution_bytes())
    assert record.obtained["peak_footprint_bytes"]["bound"] == bound


def test_a_script_that_takes_too_long_is_killed_with_what_was_seen_of_it(tmp_path: Path) -> None:
    text = "import membench, time\nwith membench.phase('wait'):\n    x = bytearray(b'1') * 2**26\n    time.sleep(99)"
    record = measured(tmp_path, text, settings={"timeout_s": 1.5}, limits={"peak_footprint": "32 MiB"})
    assert (record.status, record.ended_in, record.message) == ("timeout", "wait", "not done after 1.5 s")
    assert phases_of(record)["wait"]["peak_footprint_bytes"] > 64 * _MIB
    assert record.broken_limits[0].endswith("is over its limit of 32.00 MiB")


def test_children_are_in_the_figure_as_far_as_samples_saw_them(tmp_path: Path) -> None:
    held = "import time; x = bytearray(b'1') * (64 * 2**20); time.sleep(0.5)"
    text = (
        "import membench, subprocess, sys\nx = bytearray(b'1') * (64 * 2**20)\n"
        f"with membench.phase('child'):\n    subprocess.run([sys.executable, '-c', {held!r}])\n"
    )
    record = measured(tmp_path, text)
    for figures in (record.metrics["peak_footprint_bytes"], phases_of(record)["child"]["peak_footprint_bytes"]):
        assert figures is not None
        assert 128 * _MIB < figures < 170 * _MIB
    assert record.obtained["peak_footprint_bytes"]["bound"] == phases_of(record)["child"]["bound"] == "at least"
    assert 64 * _MIB < (record.metrics["children_peak_bytes"] or 0) < 80 * _MIB


def test_processes_that_outlive_their_script_are_killed_and_named(tmp_path: Path) -> None:
    text = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "open('child', 'w').write(str(child.pid))"
    )
    with contextlib.chdir(tmp_path):
        record = measured(tmp_path, text)
    assert record.status == "ok"
    assert record.remarks == ("a process outlived the script and was killed: sleep",)
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_only_the_script_itself_marks_phases(tmp_path: Path) -> None:
    text = (
        "import membench, os, subprocess, sys\n"
        "with membench.phase('own'):\n"
        "    if os.fork() == 0:\n        with membench.phase('fork'): pass\n        os._exit(0)\n"
        "    os.wait()\n"
        "    code = 'import membench\\nwith membench.phase(\"child\"): pass'\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    record = measured(tmp_path, text)
    assert (record.status, list(phases_of(record))) == ("ok", ["script", "own"])


def test_threads_mark_phases_of_their_own(tmp_path: Path) -> None:
    text = (
        "import membench, threading, time\n"
        "def work():\n    with membench.phase('thread'): time.sleep(0.2)\n"
        "with membench.phase('outer'):\n"
        "    threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "    [each.start() for each in threads]\n    [each.join() for each in threads]\n"
    )
    phases = phases_of(measured(tmp_path, text))
    assert list(phases) == ["script", "outer", "thread"]
    assert 0.2 <= phases["thread"]["duration_s"] <= phases["outer"]["duration_s"]


def test_an_interrupted_script_is_killed_and_its_record_is_kept(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import membench, os, time\nwith membench.phase('wait'):\n    open('pid', 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "membench", "run", "--script", "slow.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid_file = tmp_path / "pid"
    _wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors.startswith("interrupted; what was measured is kept in results/slow-")
    record = newest(tmp_path)
    assert (record.status, record.ended_in, record.message) == ("crashed", "wait", "interrupted")
    assert phases_of(record)["wait"]["peak_footprint_bytes"] > 0
    assert not psutil.pid_exists(int(pid_file.read_text()))


def _wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_limits_repeats_and_machine_readable_output_are_as_for_suites(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("print('not JSON'); x = bytearray(b'1') * (64 * 2**20)")
    words = ("--script", "own.py", "--repeats", "2", "--limit", "peak_footprint=32MiB", "--format", "json")
    ran = membench_run(tmp_path, *words)
    assert ran.done.returncode == 1
    (row,) = json.loads(ran.done.stdout)
    assert (row["case"], row["status"]) == ("own/none/script/cpu", "over limit")
    assert ran.done.stderr.startswith("not JSON\nnot JSON\n")
    run = membench.read_run(membench.newest_run(tmp_path / "results"))
    assert [record.repeat for record in run.records] == [0, 1]


_SUITE = """\
[suite]
name = "mine"
[script]
file = "sub/own.py"
arguments = ["64"]
[settings]
repeats = 2
[gate]
rules = ["peak_footprint < 32 MiB"]
"""


def test_a_suite_may_name_a_script_relative_to_itself_with_gates(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.py").write_text("import sys; x = bytearray(b'1') * (int(sys.argv[1]) * 2**20)")
    (tmp_path / "mine.toml").write_text(_SUITE)
    ran = membench_run(tmp_path, "mine.toml")
    assert ran.done.returncode == 1
    assert "own/none/script/cpu: peak_footprint < 32 MiB is broken" in ran.done.stdout
    assert len(membench.read_run(membench.newest_run(tmp_path / "results")).records) == 2


def test_a_program_that_is_not_python_gets_our_standard_input(tmp_path: Path) -> None:
    program = tmp_path / "own.sh"
    program.write_text('#!/bin/sh\nread line\necho "$line" "$@"\n')
    program.chmod(0o755)
    ran = membench_run(tmp_path, "--script", "./own.sh", "--", "b c", input="a\n")
    assert (ran.done.returncode, ran.done.stdout.splitlines()[0]) == (0, "a b c")


def test_a_module_runs_as_with_python_m(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "main.py").write_text("import sys; print(__name__, __package__, sys.argv[1:])")
    ran = membench_run(tmp_path, "-m", "mine.main", "--", "-x")
    assert ran.done.stdout.splitlines()[0] == "__main__ mine ['-x']"
    assert ran.record.id == "mine.main/none/script/cpu"


_BAD = {
    ("--script", "nope.py"): "--script 'nope.py': there is no such file",
    ("--script", "."): "--script '.': it is a folder",
    ("--script", "plain.txt"): "--script 'plain.txt': it is neither Python nor executable",
    ("--script", ""): "--script '': must have at least 1 character",
    ("--script", "own.py", "-m", "own"): "--script FILE and -m MODULE name two programs; name one",
    ("--script", "own.py", "quickstart"): (
        "--script runs one program, and 'quickstart' is a suite; what is for the program stands behind '--'"
    ),
    ("--script", "own.py", "--epochs", "3"): (
        "membench run has no option '--epochs'; put -- before the program's own arguments:"
        " membench run --script own.py -- --epochs"
    ),
    ("--script", "own.py", "--epochs=3", "-x"): (
        "membench run has no option '--epochs=3'; put -- before the program's own arguments:"
        " membench run --script own.py -- --epochs=3"
    ),
    ("-m", "own", "-x"): (
        "membench run has no option '-x'; put -- before the program's own arguments: membench run -m own -- -x"
    ),
    ("--script", "own.py", "--resume"): "--resume goes on with a suite; it does not go with --script",
    ("--script", "own.py", "--device", "tpu"): "script.device = 'tpu': write cpu, cuda, cuda:0 or 2xcpu",
    ("--script", "own.py", "--limit", "peak_footprint"): (
        "--limit 'peak_footprint': write METRIC=MOST, such as peak_footprint=1GiB"
    ),
    ("--script", "own.py", "--limit", "peak_live=1MiB"): (
        "limits.peak_live: of a script peak_live is not known;"
        " known: peak_footprint, total_footprint, children_peak, time, energy"
    ),
    ("--",): "what stands behind '--' is for a script: name it with --script FILE or -m MODULE",
    (): "name a suite, or a program with --script FILE or -m MODULE",
    ("quickstart", "--limit", "time=1s"): "--limit is for --script and -m; a suite has a table [limits]",
}


def test_what_cannot_be_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from membench.cli import main

    (tmp_path / "own.py").touch()
    (tmp_path / "plain.txt").touch()
    monkeypatch.chdir(tmp_path)
    said = {}
    for words in _BAD:
        assert main(["run", *words]) == 2
        said[words] = capfd.readouterr().err
    assert said == {words: f"membench: {message}\n" for words, message in _BAD.items()}


def test_an_option_that_no_verb_has_is_refused_as_before_if_no_program_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from membench.cli import main

    monkeypatch.chdir(tmp_path)
    for words in (["run", "quickstart", "--epochs", "3"], ["list", "--epochs"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "unrecognized arguments: --epochs" in capfd.readouterr().err


_KNOWN = "known: peak_footprint, total_footprint, children_peak, time, energy"
_IDLE: list[tuple[dict[str, Any], str]] = [
    ({"plugins": ["mine.py"]}, "unknown key 'suite.plugins'; known: description, name"),
    ({"metrics": ["next_token_accuracy"]}, "unknown key 'suite.metrics'; known: description, name"),
    ({"regression": {"weights": "1%"}}, f"regression.weights: of a script weights is not known; {_KNOWN}"),
    (
        {"gate": {"rules": ["weights <= 1 MiB"]}},
        f"gate: rule 'weights <= 1 MiB': of a script weights is not known; {_KNOWN}",
    ),
    (
        {"gate": {"rules": ["time <= 2 * reference"]}},
        "gate: rule 'time <= 2 * reference': a script has no reference; hold it against an amount",
    ),
]


@pytest.mark.parametrize(("tables", "said"), _IDLE)
def test_what_would_never_say_anything_of_a_script_is_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError) as caught:
        membench.Suite("own", script={"file": "/bin/true"}, **tables)
    assert str(caught.value) == f"suite 'own': {said}"


def test_a_script_that_must_not_be_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "own.py"
    path.touch(0o200)
    with pytest.raises(SuiteError, match="it cannot be read"):
        membench.Suite("own", script={"file": str(path)})


def test_marking_a_phase_does_nothing_where_nothing_is_measured_and_imports_next_to_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules)\nimport membench\nwith membench.phase('x'): pass\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('membench')))\n"
        "assert not {'torch', 'numpy', 'json', 'pydantic'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("['membench', 'membench.protocol', 'membench.protocol.marks']\n", "")


def test_a_decorated_function_returns_what_it_returns_and_may_call_itself() -> None:
    @membench.phase("factorial")
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    assert factorial(5) == 120


def test_what_works_after_the_call_cannot_be_decorated() -> None:
    async def work() -> None: ...

    with pytest.raises(TypeError, match="work does nothing yet when it is called"):
        membench.phase("x")(work)
    with pytest.raises(TypeError, match="the name of a phase is text, not 3"):
        membench.phase(3)  # type: ignore[arg-type]
