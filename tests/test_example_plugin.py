"""Somebody else's package, installed by pip into a fresh environment and measured like what is built in."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tests.fresh_environment import FreshEnvironment

_PACKAGE = Path(__file__).parent / "example_plugin"
_TABLE_BYTES = 4 * 256 * 4096


@pytest.fixture
def installed(fresh: FreshEnvironment, tmp_path: Path) -> FreshEnvironment:
    """The package in an environment; a copy, since building writes into the folder."""
    shutil.copytree(_PACKAGE, tmp_path / "example")
    ran = fresh.run("pip install ./example", tmp_path)
    assert ran.returncode == 0, ran.stderr
    shutil.rmtree(tmp_path / "example" / "src")
    return fresh


def test_it_is_listed_passes_its_tests_and_is_measured(installed: FreshEnvironment, tmp_path: Path) -> None:
    ran = installed.run("membench list techniques; membench list suites; membench list reread", tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert any(line[:4] == ["tied-head", "on", "weights", "runs"] for line in lines)
    assert any(line[:2] == ["example", "membench-example"] for line in lines)
    assert ["length", "whole", "number,", "at", "least", "1", "default", "64"] in lines
    tested = installed.run("pytest -q -p no:cacheprovider example/tests", tmp_path)
    assert tested.returncode == 0, tested.stdout
    ran = installed.run("membench run example --format json", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cases = json.loads(ran.stdout)
    weights = {case["case"]: case["weights_bytes"] for case in cases}
    assert weights == {
        "two-tables/none/reread/cpu": 2 * _TABLE_BYTES,
        "two-tables/tied-head/reread/cpu": _TABLE_BYTES,
        "two-tables/bf16/reread/cpu": _TABLE_BYTES,
        "two-tables/tied-head+bf16/reread/cpu": _TABLE_BYTES / 2,
    }
    entropy = {case["case"]: case["own.mean_entropy.lower.nats"] for case in cases}
    assert math.log(256) - 0.5 < entropy["two-tables/none/reread/cpu"] < math.log(256)
    # A vector's product with itself is far above all others, so the next token is the last one.
    assert entropy["two-tables/tied-head/reread/cpu"] == pytest.approx(0, abs=1e-6)
