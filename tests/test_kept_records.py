"""What is written is what is read: a record with values that no reader takes is kept as a failed one."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from membench.errors import ResultsError
from membench.protocol.readings import PhaseReading
from membench.records.record import Record
from membench.records.run_file import RunFile, read_run
from tests import made_up

_HEADER = {"run": "r", "suite": "s"}


def _record(**changed: Any) -> Record:
    process = made_up.process(phases=[{"name": "load"}, {"name": "run"}], losses_nats=[1.0])
    good = made_up.record("none", weights_bytes=4, step_median_s=0.5)
    return dataclasses.replace(good, processes=(process,), reasons={"disk_bytes": "none"}, **changed)


def _kept(path: Path, record: Record) -> Record:
    """Append a record between two others; return it as it is read."""
    with RunFile.create(path / "run.jsonl", _HEADER) as file:
        file.append(_record())
        appended = file.append(dataclasses.replace(record, repeat=1))
        file.append(_record(repeat=2))
    first, read, last = read_run(path / "run.jsonl").records
    assert first.status == last.status == "ok"
    assert (read.status, read.message) == (appended.status, appended.message)
    return read


def test_a_good_record_is_kept_as_it_is(tmp_path: Path) -> None:
    assert _kept(tmp_path, _record()) == _record(repeat=1)


@pytest.mark.parametrize(
    "odd",
    [math.nan, math.inf, -2**70, 1e300, 10**400, 10**5000, True, "3", [3], {}, numpy.int64(3), numpy.bool_(True),
     object(), b"3", 1 + 2j],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_metric_that_no_reader_takes_is_left_out_and_named(tmp_path: Path, odd: Any) -> None:
    record = _record()
    read = _kept(tmp_path, dataclasses.replace(record, metrics={**record.metrics, "peak_live_bytes": odd}))
    assert read.status == "failed"
    assert str(read.message).startswith("what was read cannot be kept: metrics.peak_live_bytes = ")
    assert str(read.message).isprintable()
    assert len(str(read.message)) < 500
    assert read.metrics == {"weights_bytes": 4, "step_median_s": 0.5, "peak_live_bytes": None}
    assert read.reasons["disk_bytes"] == "none"
    assert read.reasons["peak_live_bytes"].startswith("no reader takes it: ")
    assert read.processes == record.processes


def test_the_plug_in_of_a_metric_is_named(tmp_path: Path) -> None:
    case = {**_record().case, "metric_plugins": {"own.taste.lower": {"use": "taste", "options": {}}}}
    read = _kept(tmp_path, _record(case=case, metrics={"own.taste.lower": math.nan, "own.bad": 1.0}))
    assert read.metrics == {"own.taste.lower": None}
    assert "metrics.own.taste.lower = nan" in str(read.message)
    assert "(from metric 'taste')" in str(read.message)
    assert "metrics.own.bad: a plug-in's metric is 'own.NAME.lower'" in str(read.message)


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("remarks", (3,)), ("notes", ({},)), ("timeline", {"at_s": [1.0], "rss_bytes": []}), ("reasons", {"a": 3}),
        ("output_tail", b"x"), ("machine", {"cores": "2"}), ("settings", {"seed": math.nan}), ("duration_s", -1.0),
        ("obtained", {"weights_bytes": {"bound": "roughly"}}), ("ended_in", 3), ("broken_limits", (None,)),
    ],
)  # fmt: skip
def test_any_other_part_that_no_reader_takes_is_left_out_and_named(tmp_path: Path, part: str, odd: Any) -> None:
    read = _kept(tmp_path, dataclasses.replace(_record(), **{part: odd}, message="why\x1b"))
    assert read.status == "failed"
    assert str(read.message).startswith(f"what was read cannot be kept: {part}")
    assert str(read.message).endswith("; before that: why\\x1b")
    assert read.metrics == _record().metrics
    assert read.processes == _record().processes


def test_of_a_process_all_is_kept_that_a_reader_takes(tmp_path: Path) -> None:
    record = _record()
    odd: Any = math.nan
    bad = PhaseReading(name="time", allocator="default", duration_s=odd)
    process = dataclasses.replace(record.processes[0], corpus=odd, phases=(*record.processes[0].phases, bad))
    read = _kept(tmp_path, dataclasses.replace(record, processes=(process,)))
    assert str(read.message).startswith("what was read cannot be kept: processes")
    assert read.processes == record.processes


def test_options_that_json_cannot_hold_are_kept_as_text(tmp_path: Path) -> None:
    plugin = {"use": "m", "options": {"when": datetime.date(2026, 1, 2), "size": math.inf, "huge": 10**400}}
    read = _kept(tmp_path, _record(case={**_record().case, "model_plugin": plugin}))
    assert read.status == "failed"
    assert read.case["model_plugin"]["options"]["when"] == "datetime.date(2026, 1, 2)"
    assert read.metrics == _record().metrics


def test_a_job_without_a_valid_name_is_an_error_and_the_file_stays_whole(tmp_path: Path) -> None:
    with RunFile.create(tmp_path / "run.jsonl", _HEADER) as file:
        file.append(_record())
        with pytest.raises(ResultsError, match=r"the record of \.\./x cannot be kept: .*before is kept"):
            file.append(dataclasses.replace(_record(), id="../x", case={**_record().case, "model_plugin": {}}))
    assert len(read_run(tmp_path / "run.jsonl").records) == 1
