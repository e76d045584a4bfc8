"""The doctor's table of known amounts, on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import membench
from membench.doctor import checks
from membench.errors import MembenchError
from membench.host import console, procfs
from membench.host.nvml import gpus
from membench.records.record import Record
from tests import made_up


def test_every_known_amount_is_read_right_here() -> None:
    findings = checks.known_amounts()
    assert {finding.what for finding in findings if finding.verdict == "OFF"} == set()
    assert {finding.metric for finding in findings} >= {"held_live_bytes", "peak_live_bytes", "children_peak_bytes"}


@pytest.mark.parametrize(("verdict", "code"), [("OFF", 1), ("right", 0), ("not measured", 0), ("too noisy to tell", 0)])
def test_only_a_reading_that_is_off_makes_the_exit_code_one_but_each_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: checks.Verdict, code: int
) -> None:
    found = checks.Finding("64 MiB", "held_live_bytes", "70 MiB", "64 MiB", "+9.4%", "0.5%", verdict)
    monkeypatch.setattr(checks, "known_amounts", lambda: [found])
    assert checks.report(full=False) == code
    assert f"  {verdict}" in capsys.readouterr().out


Durations = Callable[[random.Random, bool], float]


def _steps(for_s: float, duration_s: Durations) -> Iterator[float]:
    """Steps that follow each other; ``duration_s`` hears whether one begins while it is observed."""
    source, at_s = random.Random(0), 0.0
    while at_s < for_s:
        step_s = duration_s(source, int(at_s / 0.25) % 2 == 0)
        yield step_s
        at_s += step_s


@pytest.mark.parametrize(
    ("for_s", "duration_s", "verdict", "reading"),
    [
        (10, lambda source, seen: 0.004, "right", "0.00%"),
        (10, lambda source, seen: 0.004 * source.uniform(0.98, 1.02), "right", "0.0"),
        (10, lambda source, seen: 0.004 * (1.05 if seen else 1), "OFF", "5.00%"),
        (10, lambda source, seen: 0.004 * source.uniform(0.98, 1.02) * (1.05 if seen else 1), "OFF", ("4.", "5.")),
        (10, lambda source, seen: 0.05 * source.uniform(0.5, 1.5), "too noisy to tell", ""),
        (2, lambda source, seen: 0.004, "too noisy to tell", None),
        (0.1, lambda source, seen: 0.004, "too noisy to tell", None),
        (10, lambda source, seen: 0.3, "too noisy to tell", None),
    ],
)
def test_observing_is_cleared_or_blamed_only_where_the_interval_says_so(
    for_s: float, duration_s: Durations, verdict: str, reading: str | tuple[str, ...] | None
) -> None:
    found = checks._slowing("observing", 0.0, list(_steps(for_s, duration_s)), checks._Blinking())
    assert found.verdict == verdict
    if reading is None:
        assert found.reading is None
        assert found.note.endswith("too few for an interval")
    else:
        assert (found.reading or "").lstrip("-").startswith(reading)
        assert "95% interval" in found.note


def _record(status: str = "ok", **changes: object) -> Record:
    empty = dict.fromkeys((field.name for field in dataclasses.fields(Record)), ())
    known = {"id": "m/none/w/cpu", "status": status, "message": "what went wrong", "metrics": {}, "reasons": {}}
    return Record(**{**empty, **known, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "promise", [checks._repeats, checks._training, checks._cost_of_a_case, checks._cost_of_observing]
)
def test_a_case_that_ends_badly_is_a_finding_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, promise: Callable[[], checks.Finding]
) -> None:
    monkeypatch.setattr(checks, "_records", lambda *_: (_record("crashed"),))
    found = promise()
    assert (found.reading, found.verdict) == (None, "OFF")
    assert "what went wrong" in found.note


def test_what_the_harness_adds_is_the_time_beside_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    process = made_up.process(phases=[{"duration_s": 0.7}, {"duration_s": 0.2}])
    records = [_record(duration_s=duration_s, processes=(process,)) for duration_s in (9, 1.1, 1.15, 1.4)]
    monkeypatch.setattr(checks, "_records", lambda _: tuple(records))
    found = checks._cost_of_a_case()
    assert (found.reading, found.verdict) == ("250 ms", "right")


def test_a_listing_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert checks._listing().verdict == "OFF"


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


def test_the_doctor_called_as_a_module_can_be_interrupted() -> None:
    doctor = subprocess.Popen([sys.executable, "-m", "membench.doctor"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)  # fmt: skip
    for _ in itertools.takewhile(lambda _: not procfs.children(doctor.pid), range(1000)):
        time.sleep(0.02)
    doctor.send_signal(signal.SIGINT)
    out, errors = doctor.communicate(timeout=60)
    assert (doctor.returncode, out, errors) == (130, "", "membench: interrupted\n")


def test_programs_turn_errors_meant_for_users_into_a_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise MembenchError("no folder")

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert console.main(fail) == 2
        assert console.main(lambda: 1) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "membench: no folder\n"
