"""What repeats of the same code show of a machine's noise, and what they cannot show."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

import membench
from membench import cli
from membench.records.disturbed_times import is_disturbed
from membench.records.record import Record
from membench.regression import baselines
from membench.regression.noise import Noise, Spread
from membench.report import noise as report
from membench.running import runner
from membench.running.fork_client import ForkServer

_SUITE = """\
[suite]
name = "still"
[matrix]
model = ["ballast"]
technique = ["none"]
workload = ["still"]
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 2
"""
_CASE = "ballast/none/still/cpu"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "still.toml").write_text(_SUITE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_repeat_is_of_a_new_fork_server_and_the_spread_is_kept_with_the_baseline(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []

    class Counted(ForkServer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self._process.pid)

    monkeypatch.setattr(runner, "ForkServer", Counted)
    assert cli.main(["calibrate", "still.toml", "--repeats", "3"]) == 0
    assert len(set(started)) == 3
    run = membench.read_run(membench.newest_run("results"))
    assert [record.repeat for record in run.records] == [0, 1, 2]
    (name,) = baselines.names()
    assert name.startswith("still@")
    kept = baselines.read(baselines.path_of(name))
    # Other tests may have disturbed a repeat: nothing is learnt from its time.
    calm = [record for record in run.records if not is_disturbed(record, "step_median_s")]
    spread = kept.noise.spreads.get(_CASE, {}).get("step_median_s")
    assert (spread.runs if spread else 0) == (len(calm) if len(calm) > 1 else 0)
    if spread:
        values = [record.metrics["step_median_s"] for record in calm]
        assert spread.range == pytest.approx(max(values) - min(values), rel=1e-3)  # type: ignore[type-var, operator]
    said = capsys.readouterr().out
    assert "each case was measured 3 times, each time out of a fork server of its own\n" in said
    assert "range: the highest less the lowest" in said
    assert f"kept in results/baselines/{name}.json, which is a baseline of this code\n" in said

    # Once more, where a baseline lies already: its figures and other cases' noise stay.
    figures = kept.cases[_CASE].values
    path = baselines.path_of(name)
    content = json.loads(path.read_text())
    content["noise"] = {"m/other/w/cpu": {"disk_bytes": {"runs": 2, "range": 5, "median": 7}}}
    content["cases"][_CASE]["values"]["weights_bytes"] = [1, 1, 1]
    path.write_text(json.dumps(content))
    assert cli.main(["calibrate", "still.toml", "--repeats", "2"]) == 0
    again = baselines.read(path)
    assert again.noise.spreads["m/other/w/cpu"] == {"disk_bytes": Spread(2, 5, 7)}
    assert again.noise.spreads[_CASE]["step_median_s"].runs == 2
    assert again.cases[_CASE].values["weights_bytes"] == [1, 1, 1]
    assert again.cases[_CASE].values["step_median_s"] == figures["step_median_s"]
    said = capsys.readouterr().out
    assert "whose figures are as they were" in said
    assert "with less than 5 repeats the noise of times stays unknown" in said


def test_it_is_kept_under_the_name_that_is_given_if_what_lies_there_can_have_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", "still.toml", "main", "--repeats", "2"]) == 0
    assert baselines.names() == ["main"]
    path = baselines.path_of("main")
    kept = json.loads(path.read_text())

    def refused(**changed: Any) -> tuple[int, str]:
        path.write_text(json.dumps({**kept, **changed}))
        runs = set(Path("results").glob("*.jsonl"))
        code = cli.main(["calibrate", "still.toml", "main", "--repeats", "2"])
        assert set(Path("results").glob("*.jsonl")) == runs
        return code, capsys.readouterr().err.splitlines()[-1]

    capsys.readouterr()
    assert refused(suite="other") == (2, f"membench: {path}: is a baseline of suite 'other', not of 'still'")
    cores = kept["machine"]["cores"]
    code, said = refused(machine={**kept["machine"], "cores": 512})
    assert (code, f"is of another machine (cores: 512, now {cores})" in said) == (3, True)
    assert cli.main(["calibrate", "still.toml", "../main"]) == 2


@pytest.mark.parametrize("repeats", ["1", "0", "-3", "many", "1001"])
def test_fewer_repeats_than_two_show_nothing_and_are_refused(
    folder: Path, repeats: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["calibrate", "still.toml", f"--repeats={repeats}"])
    assert raised.value.code == 2
    assert "noise shows from two repeats on; write a number from 2 to 1000" in capsys.readouterr().err


def _record(repeat: int, status: str = "ok", **metrics: float | None) -> Record:
    case = {"model": "m", "technique": "none", "workload": "w", "device": "cpu"}
    reasons = {name: "no GPU" for name, value in metrics.items() if value is None}
    return Record(
        case=case, id="m/none/w/cpu", repeat=repeat, status=status, ended_in=None,  # type: ignore[arg-type]
        message=None, started_at="", duration_s=1.0, metrics=metrics, reasons=reasons, obtained={}, processes=(),
        remarks=(), notes=(), broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


def test_the_table_has_the_spread_of_what_is_watched_and_a_reason_where_there_is_none() -> None:
    records = [
        _record(0, weights_bytes=2**20, step_median_s=0.5, energy_j=None),
        _record(1, weights_bytes=2**20 + 1024, energy_j=None),
        _record(2, "crashed", weights_bytes=2**30, energy_j=None),
    ]
    noise = Noise.of_records(records)
    assert report.table(records, noise, "plain").splitlines() == [
        "case          metric    repeats    median     range      noise      of median    note",
        "m/none/w/cpu  weights   2          1.000 MiB  1.000 KiB  3.761 KiB  0.37%",
        "m/none/w/cpu  time      1          500 ms     –          –          –            "
        "known of 1 of 3 repeats, two are needed: crashed",
    ]
    rows = list(csv.DictReader(io.StringIO(report.table(records, noise, "csv"))))
    assert [row["metric"] for row in rows] == ["weights", "time", "energy"]
    assert [(row["range"], row["noise"]) for row in rows][1:] == [("", ""), ("", "")]
    ended_well = [record for record in records if record.status == "ok"]
    (energy,) = [row for row in json.loads(report.table(ended_well, noise, "json")) if row["metric"] == "energy"]
    assert (energy["noise"], energy["reason"]) == (None, "known of 0 of 2 repeats, two are needed: no GPU")
