"""The doctor's table of known amounts, on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import membench
from membench import doctor
from membench.nvml import gpus


def test_every_known_amount_is_read_right_here() -> None:
    findings = doctor.known_amounts()
    assert {finding.what for finding in findings if not finding.is_right} == set()
    assert {finding.metric for finding in findings} >= {"held_live_bytes", "peak_live_bytes", "children_peak_bytes"}


def test_a_reading_that_is_off_makes_the_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = doctor.Finding("64 MiB", "held_live_bytes", "70 MiB", "64 MiB", "+9.4%", "0.5%", False)
    monkeypatch.setattr(doctor, "known_amounts", lambda: [off])
    assert doctor.report(full=False) == 1
    assert "OFF" in capsys.readouterr().out


def test_a_spawned_worker_reads_the_same_amounts(tmp_path: Path) -> None:
    path = tmp_path / "spawned.toml"
    path.write_text(
        '[suite]\nname = "spawned"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["burst"]\n'
        '[settings]\nisolation = "spawn"\nthreads = 1\nmeasured_steps = 1\n'
    )
    (record,) = membench.run(membench.load_suite(path), output=tmp_path).records
    assert record.status == "ok"
    assert record.metrics["peak_live_bytes"] == pytest.approx(364 * 2**20, rel=0.005)
    assert record.metrics["step_p95_s"] is None
    assert record.reasons["step_p95_s"] == "one step has no spread: settings.measured_steps is 1"


@pytest.mark.gpu
def test_live_memory_on_a_gpu_is_exact(tmp_path: Path) -> None:
    found, reason = gpus()
    if found is None:
        pytest.skip(reason or "no GPU")
    path = tmp_path / "gpu.toml"
    path.write_text(
        '[suite]\nname = "gpu"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["burst"]\n'
        'device = ["cuda"]\n'
    )
    (record,) = membench.run(membench.load_suite(path), output=tmp_path).records
    assert record.status == "ok"
    assert record.metrics["peak_live_bytes"] == pytest.approx(364 * 2**20, rel=0.005)
    assert record.metrics["peak_footprint_bytes"] is not None


def test_without_a_gpu_a_cuda_case_is_skipped_with_the_reason(tmp_path: Path) -> None:
    if gpus()[0] is not None:
        pytest.skip("there is a GPU here")
    path = tmp_path / "none.toml"
    path.write_text(
        '[suite]\nname = "none"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["burst"]\n'
        'device = ["cuda"]\n'
    )
    (record,) = membench.run(membench.load_suite(path), output=tmp_path).records
    assert (record.status, record.message) == ("skipped", "no CUDA device here, or a torch build without CUDA")


def test_the_doctor_can_be_called_as_a_module() -> None:
    code = "import membench.doctor, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
