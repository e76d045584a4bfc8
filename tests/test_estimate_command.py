"""``membench estimate``: a suite's own table without a run of it, its rules judged, and how far it is from a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import membench
from membench.cli import main
from membench.errors import EXIT_BAD_INPUT, EXIT_CANNOT_COMPARE, EXIT_CASES_FAILED, EXIT_OK
from membench.records.run_file import Run
from tests import parallel

_SUITE = f"""
[suite]
name = "small"
[matrix]
model = ["small"]
technique = ["none", "bf16"]
workload = ["brief"]
device = ["cpu"]
[workload.brief]
use = "train"
batch_size = 4
sequence_length = 64
{parallel.MODEL}
{parallel.SETTINGS}
"""
_STATES_BYTES = 2 * parallel.WEIGHTS_BYTES


def _written(folder: Path, *more: str) -> Path:
    path = folder / "suite.toml"
    path.write_text("\n".join((_SUITE, *more)))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("measured")
    return membench.run(membench.load_suite(_written(folder)), output=folder)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("estimated")
    return membench.estimate(membench.load_suite(_written(folder)), output=folder)


def test_weights_states_and_gradients_are_those_of_arithmetic(estimated: Run) -> None:
    full, half = (record.metrics for record in estimated.records)
    for metrics, share in ((full, 1), (half, 0.5)):
        assert metrics["weights_bytes"] == pytest.approx(share * parallel.WEIGHTS_BYTES, rel=0.001)
        assert metrics["trained_weights_bytes"] == pytest.approx(share * parallel.WEIGHTS_BYTES, rel=0.001)
        assert metrics["optimizer_state_bytes"] == pytest.approx(share * _STATES_BYTES, rel=0.001)
        assert metrics["gradients_bytes"] == pytest.approx(share * parallel.WEIGHTS_BYTES, rel=0.005)


def test_every_figure_says_how_it_was_obtained_and_that_it_is_an_estimate(estimated: Run) -> None:
    for record in estimated.records:
        assert record.status == "ok"
        sources = {how["source"].partition(":")[0] for how in record.obtained.values()}
        assert sources == {"traced", "the highest of the phases' live peaks"}
        assert {how["bound"] for how in record.obtained.values()} == {"about"}


def test_a_part_of_the_step_is_named_in_which_the_peak_occurs(estimated: Run) -> None:
    (process,) = estimated.records[0].processes
    assert process.breakdown_bytes is not None
    parts = {part: sum(sizes.values()) for part, sizes in process.breakdown_bytes.items()}
    assert process.peak_part == max(parts, key=lambda part: parts[part])
    assert (estimated.records[0].metrics["peak_live_bytes"] or 0) >= parts[process.peak_part]


def test_the_table_is_the_suites_own_and_a_limit_fails_as_in_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = _written(tmp_path, "[limits]", 'weights = "9.5 MiB"')
    assert main(["estimate", str(suite), "--format", "json", "-k", "bf16"]) == EXIT_CASES_FAILED
    out = capsys.readouterr()
    assert "small/none/brief/cpu: weights 12.76 MiB is over its limit of 9.500 MiB" in out.err
    rows = json.loads(out.out)
    assert [row["case"] for row in rows] == ["small/none/brief/cpu", "small/bf16/brief/cpu"]
    assert rows[1]["weights_ratio"] == pytest.approx(0.5, abs=0.001)
    assert not list(tmp_path.glob("*.jsonl"))


def test_errors_are_those_of_estimate_and_measurement(
    measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = str(_written(tmp_path))
    assert main(["estimate", suite, "--against", str(measured.path), "--format", "json"]) == EXIT_OK
    out = capsys.readouterr()
    rows = json.loads(out.out)
    weights = [row for row in rows if row["metric"] == "weights"]
    assert [row["measured"] for row in weights] == [record.metrics["weights_bytes"] for record in measured.records]
    for row in rows:
        assert row["error_percent"] == pytest.approx((row["estimated"] / row["measured"] - 1) * 100, abs=0.001)
        if row["metric"] in ("weights", "optimizer_state"):
            assert abs(row["error_percent"]) < 0.1
    assert "live peak of 2 cases: median error" in out.err


def test_a_run_of_other_cases_has_nothing_to_hold_an_estimate_against(
    measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = _written(tmp_path)
    suite.write_text(suite.read_text().replace('workload = ["brief"]', 'workload = ["other"]')
                     .replace("[workload.brief]", "[workload.other]"))  # fmt: skip
    assert main(["estimate", str(suite), "--against", str(measured.path)]) == EXIT_CANNOT_COMPARE
    assert "none of the suite's cases is in it" in capsys.readouterr().err


def test_a_program_cannot_be_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "program.py").write_text("pass")
    path = tmp_path / "suite.toml"
    path.write_text('[suite]\nname = "program"\n[script]\nfile = "program.py"\n')
    assert main(["estimate", str(path)]) == EXIT_BAD_INPUT
    assert "a program cannot be estimated" in capsys.readouterr().err


def test_the_process_that_asks_for_estimates_imports_no_torch(tmp_path: Path) -> None:
    code = (
        f"import sys, membench; suite = membench.load_suite({str(_written(tmp_path))!r});"
        "membench.estimate(suite, keep=lambda name: '/none/' in name); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
