"""Going on with a run that was interrupted: the right one, whole, and no figures that do not belong together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.errors import ResultsError
from membench.host import environment

_SUITE = """\
[suite]
name = "{name}"
[matrix]
model = ["small"]
technique = ["none", "bf16"]
workload = ["still"]
[model.small]
use = "ballast"
mib = 1
[workload.still]
use = "burst"
mib = 0
hold_s = {hold_s}
[settings]
threads = 1
measured_steps = 1
"""


def _written(folder: Path, name: str, hold_s: float = 0) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(_SUITE.format(name=name, hold_s=hold_s))
    return path


def _cut_to(path: Path, lines: int, torn: bytes = b"") -> None:
    """Leave of a run what a kill at that point would have left."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + torn)


def _begun(suite: membench.Suite, folder: Path) -> Path:
    """A run of which no case was measured yet."""
    return membench.run(suite, keep=lambda _: False, output=folder).path


def _techniques(run: membench.Run) -> list[str]:
    return [record.technique for record in run.records]


def test_a_run_goes_on_after_its_last_whole_record(tmp_path: Path) -> None:
    suite = membench.load_suite(_written(tmp_path, "s"))
    first = membench.run(suite, output=tmp_path)
    _cut_to(first.path, 2, torn=b'{"schema":1,"id":"small/bf')
    heard: list[tuple[str, Any]] = []
    run = membench.run(suite, output=tmp_path, resume=True, tell=lambda event, details: heard.append((event, details)))
    assert run.path == first.path
    assert _techniques(run) == ["none", "bf16"]
    assert run.records[0] == first.records[0]
    assert run.records[1].machine == run.header["machine"]
    (start,) = [details for event, details in heard if event == "start"]
    assert (start["done"], start["of"]) == (1, 2)
    (case,) = [details for event, details in heard if event == "case"]
    assert case == {"id": "small/bf16/still/cpu", "number": 2, "of": 2}
    assert run.path.read_bytes().count(b"\n") == 3

    nothing_left = membench.run(suite, output=tmp_path, resume=True)
    assert nothing_left.records == run.records


def test_a_suite_goes_on_with_its_own_run_and_not_with_that_of_a_longer_name(tmp_path: Path) -> None:
    suites = {name: membench.load_suite(_written(tmp_path, name)) for name in ("a", "a-b")}
    paths = {name: _begun(suite, tmp_path) for name, suite in suites.items()}
    later = time.time() + 60
    os.utime(paths["a-b"], (later, later))
    assert membench.run(suites["a"], output=tmp_path, resume=True).path == paths["a"]
    assert _techniques(membench.read_run(paths["a"])) == ["none", "bf16"]
    assert _techniques(membench.read_run(paths["a-b"])) == []


_PREPARED = """\
import os, pathlib, signal
from membench.builtin.known_amounts import Ballast
class Prepared(Ballast):
    how: str
    def prepare(self, progress):
        if pathlib.Path(self.how).exists():
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_cases_whose_models_preparing_was_killed_are_measured_after_all(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_PREPARED)
    flag = tmp_path / "killed"
    flag.touch()
    suite = _written(tmp_path, "s")
    text = suite.read_text().replace('use = "ballast"', f'use = "prepared"\nhow = "{flag}"')
    suite.write_text(text.replace('name = "s"', 'name = "s"\nplugins = ["own.py"]'))
    killed = membench.run(membench.load_suite(suite), output=tmp_path)
    assert [(record.status, record.ended_in) for record in killed.records] == [("crashed", "prepare")] * 2
    assert killed.records[0].message == "preparing the model ended as crashed: killed by SIGKILL"
    flag.unlink()
    run = membench.run(membench.load_suite(suite), output=tmp_path, resume=True)
    assert run.path == killed.path
    assert [(record.technique, record.repeat, record.status) for record in run.records] == [
        ("none", 0, "ok"), ("bf16", 0, "ok"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, suite's path) of a run that was begun."""
    folder = tmp_path_factory.mktemp("begun")
    path = _written(folder, "s")
    _begun(membench.load_suite(path), folder)
    return folder, path


def _refusal(begun: tuple[Path, Path], suite: membench.Suite) -> str:
    folder, _ = begun
    with pytest.raises(ResultsError) as raised:
        membench.run(suite, output=folder, resume=True)
    (path,) = folder.glob("*.jsonl")
    assert path.read_bytes().count(b"\n") == 1
    assert str(raised.value).startswith(str(path))
    return str(raised.value)


def test_a_suite_that_has_changed_is_refused(begun: tuple[Path, Path], tmp_path: Path) -> None:
    changed = tmp_path / "s.toml"
    changed.write_text(begun[1].read_text().replace("measured_steps = 1", "measured_steps = 2"))
    assert "its suite 's' is not 's' as it is now; run it afresh" in _refusal(begun, membench.load_suite(changed))


def test_other_devices_than_it_began_with_are_refused(begun: tuple[Path, Path]) -> None:
    refusal = _refusal(begun, membench.load_suite(begun[1], ["cuda"]))
    assert "is a run on cpu, not on cuda; give the same --device" in refusal


def test_another_machine_is_refused(begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cores = environment.usable_cores()
    monkeypatch.setattr(environment, "usable_cores", lambda: cores + 6)
    refusal = _refusal(begun, membench.load_suite(begun[1]))
    assert f"began on another machine (cores: {cores}, now {cores + 6})" in refusal


def test_nothing_to_go_on_with_is_said(tmp_path: Path) -> None:
    suite = membench.load_suite(_written(tmp_path, "s"))
    with pytest.raises(ResultsError, match="no run of suite 's' there to go on with"):
        membench.run(suite, output=tmp_path, resume=True)


def _interrupted(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command that is interrupted as soon as the first record is on the disk."""
    before = set(folder.glob("out put/*.jsonl"))
    process = subprocess.Popen(
        [sys.executable, "-m", "membench", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        new = set(folder.glob("out put/*.jsonl")) - before
        if any(path.read_bytes().count(b"\n") == 2 for path in new):
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


def test_the_command_that_an_interruption_prints_does_what_was_left(tmp_path: Path) -> None:
    _written(tmp_path, "first one", hold_s=0.2)
    (tmp_path / "first one.toml").write_text((tmp_path / "first one.toml").read_text().replace('"first one"', '"one"'))
    second = _written(tmp_path, "two")
    # A run of the second suite that has nothing to do with the command which is interrupted.
    unrelated = _begun(membench.load_suite(second), tmp_path / "out put")

    asked = ["run", "first one.toml", "two.toml", "-k", "still and not nothing", "--device", "cpu",
             "--output", "out put", "--format", "csv"]  # fmt: skip
    ended = _interrupted(asked, tmp_path)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("interrupted")]
    assert line.startswith("interrupted; what is done is kept. To go on: ")
    command = line.partition("To go on: ")[2]
    # What was measured until then is printed, in the format that was asked for.
    assert [row.partition(",")[0] for row in ended.stdout.splitlines()] == ["case", "small/none/still/cpu"]

    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 are measured already" in done.stderr
    assert [row.partition(",")[0] for row in done.stdout.splitlines()] == [
        "case", "small/none/still/cpu", "small/bf16/still/cpu",
        "case", "small/none/still/cpu", "small/bf16/still/cpu",
    ]  # fmt: skip
    runs = [membench.read_run(path) for path in (tmp_path / "out put").glob("*.jsonl") if path != unrelated]
    assert sorted((run.header["suite"], _techniques(run)) for run in runs) == [
        ("one", ["none", "bf16"]),
        ("two", ["none", "bf16"]),
    ]
    assert _techniques(membench.read_run(unrelated)) == []
