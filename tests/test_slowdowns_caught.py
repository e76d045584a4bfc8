"""A step that takes a fifth longer, in real runs: the default tools call it slower, in turn and against a baseline.

A step is a pause that ends at its time, however long what is worked out in it took: a busy machine changes it little.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import membench
from membench.records.record import Record
from tests.repositories import SUITE, commit, repository

_CASE = "own/none/train/cpu"
_SUITE = SUITE.replace("forward", "train").replace("measured_steps = 2", "measured_steps = 5")
_MODEL = """\
import time

from torch import nn


class Paused(nn.Sequential):
    def forward(self, tokens):
        ends = time.perf_counter() + {pause_s}
        logits = super().forward(tokens)
        if self.training:
            time.sleep(max(0.0, ends - time.perf_counter()))
        return logits


def make():
    return Paused(nn.Embedding(256, 16), nn.Linear(16, 256))
"""


def _membench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}
    return subprocess.run([sys.executable, "-m", "membench", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose last commit made a model's step a fifth slower; of the one before a calibrated baseline."""
    folder = repository(tmp_path_factory.mktemp("slowed") / "repository")
    commit(folder, "The model", {"model.py": _MODEL.format(pause_s=0.1), "small.toml": _SUITE})
    calibrated = _membench(folder, "calibrate", "small.toml", "main")
    assert calibrated.returncode == 0, calibrated.stderr
    commit(folder, "Slow it down", {"model.py": _MODEL.format(pause_s=0.12)})
    return folder


def _newest(folder: Path) -> tuple[Record, ...]:
    return membench.read_run(membench.newest_run(folder)).records


def _line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("regressed: "))
    return line


def test_a_fifth_slower_fails_a_check_against_a_calibrated_baseline(here: Path) -> None:
    line = _line(_membench(here, "check", "small.toml", "--against", "main"))
    assert line.startswith(f"regressed: {_CASE}: time 1")
    assert "tolerance 10%, noise of this machine" in line
    assert line.endswith("ms forward (phase time)")
    # It was suspected after one repeat, and measured three times more before that was said.
    assert [record.repeat for record in _newest(here / "results")] == [0, 1, 2, 3]


def test_a_fifth_slower_fails_a_run_that_is_measured_in_turn_with_the_commit_before(here: Path) -> None:
    line = _line(_membench(here, "run", "small.toml", "--against-ref", "HEAD~1", "--repeats", "3"))
    assert line.startswith(f"regressed: {_CASE}: time 1")
    assert "tolerance 10%, p " in line
    assert line.endswith("ms forward (phase time)")
    medians_s = []
    for folder in (here / "results" / "base", here / "results"):
        times_s = [record.metrics["step_median_s"] for record in _newest(folder)]
        assert len(times_s) == 6
        medians_s.append(sorted(times_s)[3])  # type: ignore[type-var]
    assert medians_s[1] / medians_s[0] == pytest.approx(1.2, abs=0.05)  # type: ignore[operator]
