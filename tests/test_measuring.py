"""Known amounts and their measurement, and every way a case can end, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.host import procfs
from membench.records.record import Record
from membench.running.observer import Observer
from membench.running.timeline import Sample

MIB = 2**20

_SUITE = """\
[suite]
name = "known"
[matrix]
model = ["block"]
technique = ["none", "kill", "segfault", "raise", "hang", "print", "grow", "nothing", "rewrite", "bf16"]
workload = ["known-burst"]
[[include]]
model = "too-large"
technique = "none"
workload = "known-burst"
[settings]
timeout_s = 10
threads = 1
measured_steps = 2
[limits]
weights = "63 MiB"
"""
_SUITE += "".join(
    f'[technique.{how}]\nuse = "ends"\nhow = "{how}"\n'
    for how in ("kill", "segfault", "raise", "hang", "print", "grow", "nothing", "rewrite")
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "known.toml"
    path.write_text(_SUITE)
    run = membench.run(membench.load_suite(path), output=folder)
    return {record.id.rsplit("/", 2)[0]: record for record in run.records}


def test_a_burst_of_300_mib_is_seen_within_half_a_percent(records: dict[str, Record]) -> None:
    peak = records["block/none"].metrics["peak_live_bytes"]
    assert peak == pytest.approx((64 + 300) * MIB, rel=0.005)


def test_a_held_tensor_of_64_mib_is_seen_within_half_a_percent(records: dict[str, Record]) -> None:
    assert records["block/none"].metrics["held_live_bytes"] == pytest.approx(64 * MIB, rel=0.005)


def test_a_burst_of_300_mib_over_64_mib_that_stay_is_a_ratio_of_them(records: dict[str, Record]) -> None:
    assert records["block/none"].metrics["peak_over_held_ratio"] == pytest.approx((64 + 300) / 64, rel=0.01)


def test_weights_are_counted_to_the_byte(records: dict[str, Record]) -> None:
    assert records["block/none"].metrics["weights_bytes"] == 64 * MIB
    assert records["block/bf16"].metrics["weights_bytes"] == 32 * MIB


def test_a_broken_limit_stands_in_the_record(records: dict[str, Record]) -> None:
    assert records["block/none"].broken_limits == ("weights 64.00 MiB is over its limit of 63.00 MiB",)
    assert records["block/bf16"].broken_limits == ()


@pytest.mark.parametrize(
    ("case", "status", "message"),
    [
        ("block/kill", "crashed", "killed by SIGKILL"),
        ("block/segfault", "crashed", "killed by SIGSEGV"),
        ("block/raise", "failed", "ValueError: a technique that gives up"),
        ("block/hang", "timeout", "not done after 10 s"),
    ],
)
def test_every_bad_end_becomes_a_record_with_its_phase(
    records: dict[str, Record], case: str, status: str, message: str
) -> None:
    record = records[case]
    assert (record.status, record.message, record.ended_in) == (status, message, "apply")
    assert [phase.name for phase in record.processes[0].phases] == ["load"]
    assert record.metrics["peak_live_bytes"] is None
    assert record.reasons["peak_live_bytes"] == f"the case ended as {status}"


def test_allocating_without_end_is_out_of_memory(records: dict[str, Record]) -> None:
    assert records["block/grow"].status == "out-of-memory"


def test_a_model_that_no_machine_holds_is_refused_before_loading(records: dict[str, Record]) -> None:
    record = records["too-large/none"]
    assert (record.status, record.ended_in) == ("out-of-memory", None)
    assert record.message is not None
    assert record.message.startswith("loading needs 1048576 TiB; ")


def test_megabytes_of_output_do_no_harm(records: dict[str, Record]) -> None:
    assert records["block/print"].status == "ok"


def test_a_technique_that_did_nothing_is_named(records: dict[str, Record]) -> None:
    assert records["block/nothing"].remarks == ("'nothing' changed nothing in the model",)
    assert records["block/rewrite"].remarks == ()
    assert records["block/bf16"].remarks == ()


def test_peaks_of_parent_and_child_that_lie_apart_are_not_added(tmp_path: Path) -> None:
    path = tmp_path / "apart.toml"
    path.write_text(
        '[suite]\nname = "apart"\n[matrix]\nmodel = ["small"]\ntechnique = ["none"]\n'
        'workload = ["parent-then-child"]\n[model.small]\nuse = "block"\nmib = 1\n'
        "[settings]\nthreads = 1\nmeasured_steps = 1\n"
    )
    (record,) = membench.run(membench.load_suite(path), output=tmp_path).records
    assert record.metrics["peak_live_bytes"] == pytest.approx(201 * MIB, rel=0.005)
    how = record.obtained["peak_live_bytes"]
    assert (how["bound"], how["children"]) == ("at least", True)
    assert how["at_most_bytes"] == pytest.approx(265 * MIB, rel=0.02)
    assert record.metrics["peak_over_held_ratio"] is None
    assert "children are in the peak" in record.reasons["peak_over_held_ratio"]


def test_looking_takes_a_tenth_of_a_core_at_most_while_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_s, look = 0.05, Observer.sample

    def slowly(observer: Observer) -> Sample | None:
        time.sleep(look_s)
        return look(observer)

    monkeypatch.setattr(Observer, "sample", slowly)
    path = tmp_path / "suite.toml"
    path.write_text(
        '[suite]\nname = "timed"\n[matrix]\nmodel = ["block"]\ntechnique = ["none"]\nworkload = ["known-burst"]\n'
        "[settings]\nthreads = 1\nmeasured_steps = 40\n"
    )
    (record,) = membench.run(membench.load_suite(path), output=tmp_path).records
    assert record.status == "ok", record.message
    (process,) = record.processes
    timed = process.phase("time")
    assert timed is not None
    assert None not in (timed.samples, timed.began_s, timed.ended_s)
    # One look as it begins, one as it ends, and one under way.
    assert 2 <= (timed.samples or 0) <= 3 + ((timed.ended_s or 0) - (timed.began_s or 0)) * 0.1 / look_s


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_kill_9_of_the_runner_leaves_no_worker_and_resume_goes_on(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    path = tmp_path / "killed.toml"
    path.write_text(
        '[suite]\nname = "killed"\n[matrix]\nmodel = ["block"]\ntechnique = ["none", "hang"]\n'
        'workload = ["known-burst"]\n'
        f'[technique.hang]\nuse = "ends"\nhow = "hang"\nnote = "{note}"\n[settings]\ntimeout_s = 15\nthreads = 1\n'
    )
    command = [sys.executable, "-m", "membench", "run", str(path), "--output", str(tmp_path / "out")]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    notes = [note.with_suffix(".worker"), note.with_suffix(".child")]
    deadline = time.monotonic() + 60
    while not all(n.exists() and n.read_text() for n in notes) and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(n.read_text()) for n in notes]
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    while not all(map(_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(_gone, pids))

    suite = membench.load_suite(path)
    run = membench.run(suite, output=tmp_path / "out", resume=True)
    assert [(r.technique, r.status) for r in run.records] == [("none", "ok"), ("hang", "timeout")]
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 1


def test_a_fork_server_that_dies_costs_one_case_at_most(tmp_path: Path) -> None:
    path = tmp_path / "lost.toml"
    path.write_text(
        '[suite]\nname = "lost"\n[matrix]\nmodel = ["block"]\ntechnique = ["none", "bf16", "fp16"]\n'
        'workload = ["known-burst"]\n[settings]\nthreads = 1\nmeasured_steps = 1\n'
    )

    def kill_the_fork_server(event: str, details: Mapping[str, Any]) -> None:
        if event == "case" and details["number"] == 2:
            (server,) = (pid for pid in procfs.children(os.getpid()) if b"fork_server" in
                         Path(f"/proc/{pid}/cmdline").read_bytes())  # fmt: skip
            os.kill(server, signal.SIGKILL)

    run = membench.run(membench.load_suite(path), output=tmp_path, tell=kill_the_fork_server)
    assert [record.status for record in run.records] == ["ok", "crashed", "ok"]
    assert (run.records[1].message or "").startswith("the fork server")
