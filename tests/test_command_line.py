"""The command line as its user meets it: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import membench

_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["ballast"]
technique = ["none", "bf16"]
workload = ["still"]
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 2
"""


def _membench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "membench.cli", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(_SUITE)
    return tmp_path


def test_a_run_prints_the_table_and_show_prints_it_again(folder: Path) -> None:
    ran = _membench("run", "small.toml", folder=folder)
    assert ran.returncode == 0
    assert ran.stdout.startswith("ballast · still · cpu\n\ntechnique    status    weights")
    assert "32.00 MiB ×0.50" in ran.stdout
    assert _membench("show", folder=folder).stdout == ran.stdout


def test_phases_are_shown_on_request(folder: Path) -> None:
    _membench("run", "small.toml", folder=folder)
    shown = _membench("show", "--phases", "-k", "bf16", folder=folder).stdout
    assert "ballast/bf16/still/cpu · ok" in shown
    assert "none" not in shown
    for phase in ("load", "apply", "warmup", "run", "time", "save"):
        assert f"\n{phase} " in shown


def test_json_comes_alone_so_that_a_pipe_can_read_it(folder: Path) -> None:
    rows = json.loads(_membench("run", "small.toml", "--format", "json", folder=folder).stdout)
    assert [row["case"] for row in rows] == ["ballast/none/still/cpu", "ballast/bf16/still/cpu"]
    assert rows[1]["weights_bytes"] == 32 * 2**20


def test_a_broken_limit_makes_the_exit_code_one(folder: Path) -> None:
    (folder / "small.toml").write_text(_SUITE + '[limits]\nweights = "40 MiB"\n')
    ran = _membench("run", "small.toml", folder=folder)
    assert ran.returncode == 1
    assert "ballast/none/still/cpu: weights 64.00 MiB is over its limit of 40.00 MiB" in ran.stdout


def test_a_dry_run_names_the_cases_and_measures_nothing(folder: Path) -> None:
    ran = _membench("run", "small.toml", "-k", "bf16", "--dry-run", folder=folder)
    assert ran.stdout.split() == ["ballast/none/still/cpu", "ballast/bf16/still/cpu"]
    assert not (folder / "results").exists()


def test_bad_input_is_one_line_and_exit_code_two(folder: Path) -> None:
    for arguments in (("run", "smal"), ("run", "small.toml", "-k", "nowhere"), ("show", "absent.jsonl")):
        ran = _membench(*arguments, folder=folder)
        assert ran.returncode == 2
        assert ran.stdout == ""
        assert len(ran.stderr.splitlines()) == 1
        assert ran.stderr.startswith("membench: ")


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(folder: Path) -> None:
    (folder / "small.toml").write_text(
        _SUITE.replace('"bf16"]', '"hang"]') + '[technique.hang]\nuse = "ends"\nhow = "hang"\n'
    )
    command = [sys.executable, "-m", "membench.cli", "run", "small.toml", "--output", "out"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files = list((folder / "out").glob("*.jsonl"))
        if files and files[0].read_bytes().count(b"\n") == 2:
            break
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; what is done is kept. To go on: membench run small.toml --resume --output out" in errors
    assert "Traceback" not in errors
    assert [record.status for record in membench.read_run(files[0]).records] == ["ok"]


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    _membench("run", "small.toml", folder=folder)
    shown = subprocess.run(
        f"{sys.executable} -m membench.cli show | true", shell=True, cwd=folder, capture_output=True, text=True
    )
    assert shown.stderr == ""


def test_a_terminal_shows_the_case_its_phase_and_its_memory(folder: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "membench.cli", "run", "small.toml"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal whose last writer has gone ends so
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    assert process.wait() == 0
    assert b"Traceback" not in shown
    assert b"0/2" in shown
    assert "ballast/none/still/cpu · ".encode() in shown
