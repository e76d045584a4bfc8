"""Baselines on disk: what is kept comes back, can be read in a diff, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from membench import cli
from membench.errors import CannotCompare, ResultsError
from membench.records.run_file import read_run
from membench.regression import baseline_text, baselines, sources
from membench.regression.judging import judge
from membench.regression.measured import CommitMeasured, Measured, Modules, of_run
from membench.regression.noise import Noise, Spread
from membench.suite.tolerances import Tolerances

_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
_EARLY = Path(__file__).parent / "baselines" / "schema-1.json"
_TRAIN = "llama-60m/bf16/train/cpu"


@pytest.fixture(scope="module")
def measured() -> Measured:
    return of_run(read_run(_KEPT))


@pytest.fixture
def path(tmp_path: Path, measured: Measured) -> Path:
    path = baselines.path_of(baselines.default_name(measured), tmp_path / "baselines")
    baselines.write(measured, path)
    return path


def test_a_baseline_is_called_by_suite_and_class_of_machine(path: Path) -> None:
    assert path.name == "quickstart@2-cores-epyc.json"
    assert baselines.names(path.parent) == ["quickstart@2-cores-epyc"]


def test_what_is_kept_comes_back(path: Path, measured: Measured) -> None:
    kept = baselines.read(path)
    assert kept.name == "quickstart@2-cores-epyc"
    assert (kept.suite, kept.machine, kept.measured_at) == (measured.suite, measured.machine, measured.measured_at)
    case, was = kept.cases[_TRAIN], measured.cases[_TRAIN]
    assert case.values["peak_live_bytes"] == was.values["peak_live_bytes"]
    assert case.values["step_median_s"] == pytest.approx(was.values["step_median_s"], rel=1e-3)
    assert case.samples["step_median_s"][0] == pytest.approx(was.samples["step_median_s"][0], rel=1e-3)
    assert (case.breakdown_bytes, case.peak_part, case.phases) == (was.breakdown_bytes, was.peak_part, was.phases)
    assert case.resolution_bytes == was.resolution_bytes


def test_the_commit_of_the_code_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = {"commit": "ab" * 20, "ref": "HEAD", "is_changed": True, "committed_at": "2026-11-24T10:00:00+00:00"}
    run = read_run(_KEPT)
    found = of_run(dataclasses.replace(run, header={**run.header, "code": code}))
    assert found.code == CommitMeasured("ab" * 20, True, "2026-11-24T10:00:00+00:00")
    path = baselines.path_of("kept", tmp_path / "baselines")
    baselines.write(found, path)
    assert baselines.read(path).code == found.code
    assert cli.main(["baseline", "list", "--output", str(tmp_path)]) == 0
    assert "  commit abababababab-dirty  " in capsys.readouterr().out


def test_noise_and_modules_are_kept(tmp_path: Path, measured: Measured) -> None:
    spreads = {"peak_live_bytes": Spread(5, 1_449_984, 542_900_224), "step_median_s": Spread(5, 0.0312, 0.4361)}
    noise = Noise({_TRAIN: {**spreads, "weights_bytes": Spread(5, 0, 1)}})
    case = dataclasses.replace(measured.cases[_TRAIN], modules=[Modules("layers.*", 8, 800), Modules("head", 1, 5)])
    path = tmp_path / "b.json"
    baselines.write(dataclasses.replace(measured, cases={_TRAIN: case}, noise=noise), path)
    kept = baselines.read(path)
    assert kept.noise.floor(_TRAIN, "peak_live_bytes") == noise.floor(_TRAIN, "peak_live_bytes")
    assert kept.noise.spreads[_TRAIN] == spreads
    assert kept.noise.floor(_TRAIN, "weights_bytes") == 0
    assert kept.cases[_TRAIN].modules == [Modules("layers.*", 8, 800), Modules("head", 1, 5)]


def test_a_run_is_the_same_as_the_baseline_that_was_made_of_it(path: Path, measured: Measured) -> None:
    judgement = judge(baselines.read(path), measured, Tolerances())
    assert {change.verdict for pair in judgement.pairs for change in pair.changes} == {"same"}


def test_a_diff_shows_the_figure_that_moved_and_nothing_else(path: Path, measured: Measured) -> None:
    before = path.read_text().splitlines()
    case = measured.cases[_TRAIN]
    moved = dataclasses.replace(case, values={**case.values, "peak_live_bytes": [559_000_000]})
    baselines.write(dataclasses.replace(measured, cases={**measured.cases, _TRAIN: moved}), path)
    changed = [line for line in difflib.unified_diff(before, path.read_text().splitlines(), n=0) if line[0] in "+-"][2:]
    assert changed == ['-        "peak_live_bytes": [542900224],', '+        "peak_live_bytes": [559000000],']


def test_a_baseline_is_a_small_part_of_its_run_and_its_lines_can_be_read(path: Path) -> None:
    assert path.stat().st_size < _KEPT.stat().st_size / 5
    assert max(map(len, path.read_text().splitlines())) < 200
    json.loads(path.read_text())


def test_writing_leaves_nothing_half_done(path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match="cannot be written: No space left on device"):
        baselines.write(dataclasses.replace(measured, suite="other"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_run_in_which_nothing_ended_well_is_no_baseline(tmp_path: Path, measured: Measured) -> None:
    cases = {key: dataclasses.replace(case, status="crashed") for key, case in measured.cases.items()}
    with pytest.raises(ResultsError, match="no case of it ended well"):
        baselines.write(dataclasses.replace(measured, cases=cases), tmp_path / "b.json")


@pytest.mark.parametrize(
    "name",
    [
        "../up", "a/b", "", ".", "..", ".hidden", "a@b@c", "a\x1b[2J", "a\nb", "@epyc", "suite@", "a" * 81, "ä", "a b",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is no name for a baseline"):
        baselines.path_of(name, tmp_path)
    with pytest.raises(ResultsError):
        baselines.remove(name, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=4), "schema 4 is newer than 3; a newer membench reads it"),
        (lambda c: c.update(schema=0), "there is no schema 0"),
        (lambda c: c.update(schema=True), "no baseline ('schema' or 'cases' is missing)"),
        (lambda c: c.pop("cases"), "no baseline ('schema' or 'cases' is missing)"),
        (lambda c: c.update(cases=[]), "damaged: 'cases':"),
        (lambda c: c.update(cases={"a": 3}), "damaged: 'cases.a':"),
        (lambda c: c.update(extra=1), "damaged: 'extra':"),
        (lambda c: c["cases"][_TRAIN].update(status="fine"), f"damaged: 'cases.{_TRAIN}.status':"),
        (lambda c: c["cases"][_TRAIN]["values"].update(weights_bytes="1"), "weights_bytes':"),
        (lambda c: c["cases"][_TRAIN]["values"].update(weights_bytes=[]), "holds nothing that was measured"),
        (lambda c: c["cases"][_TRAIN]["values"].update(weights_bytes=[10**30]), "holds nothing that was measured"),
        (lambda c: c["cases"][_TRAIN]["values"].update(weights_bytes=[1e-308]), "holds nothing that was measured"),
        (lambda c: c["cases"][_TRAIN].update(values={}), "ended well and has no figures"),
        (lambda c: c["cases"].update({"a\x1b[2J": c["cases"].pop(_TRAIN)}), "damaged: case"),
        (lambda c: c.update(noise={_TRAIN: {"weights_bytes": {"runs": 1, "range": 3, "median": 2}}}), "is no spread"),
        (lambda c: c.update(noise={_TRAIN: {"weights_bytes": {"runs": 2, "range": 3, "median": 1e300}}}), "no spread"),
        (lambda c: c["cases"][_TRAIN].update(device="abacus"), "device = 'abacus'"),
        (lambda c: c["cases"][_TRAIN].update(waited_s=[[0.1]]), "waited_s is not of the steps in samples"),
        (lambda c: c.update(noise=[]), "damaged: 'noise.spreads':"),
        (lambda c: c["cases"][_TRAIN]["samples"].update(step_median_s=[[]]), "step_median_s holds nothing"),
        (lambda c: c["cases"][_TRAIN]["samples"].update(step_median_s=[[5e-324]]), "step_median_s holds nothing"),
        (lambda c: c["cases"][_TRAIN]["phases"].update(load={}), "phases holds nothing"),
        (lambda c: c["cases"][_TRAIN].update(modules=[{"modules": "a", "count": 0, "bytes": 1}]), "modules holds"),
        (lambda c: c["cases"][_TRAIN].update(modules=[{"modules": "a", "count": 1, "bytes": 10**400}]), "damaged"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_newer_is_told_in_one_line(
    change: Callable[[dict[str, Any]], object], message: str, path: Path
) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError) as raised:
        baselines.read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1e999}'])
def test_what_is_no_json_or_no_table_is_no_baseline(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError):
        baselines.read(path)


def test_a_baseline_that_is_cut_off_anywhere_is_damaged(path: Path) -> None:
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 997):
        path.write_bytes(whole[:end])
        with pytest.raises(ResultsError, match="not JSON"):
            baselines.read(path)


def test_a_name_means_a_baseline_before_it_means_a_run(path: Path, tmp_path: Path) -> None:
    (tmp_path / "quickstart@2-cores-epyc.jsonl").write_bytes(_KEPT.read_bytes())
    (tmp_path / "kept.jsonl").write_bytes(_KEPT.read_bytes())
    assert sources.load_with_run("quickstart@2-cores-epyc", tmp_path)[1] is None
    measured, run = sources.load_with_run("kept", tmp_path)
    assert run is not None
    assert (measured.name, len(measured.cases)) == ("kept", 13)
    assert sources.load(str(path), tmp_path).name == "quickstart@2-cores-epyc"
    with pytest.raises(
        ResultsError, match=r"no baseline and no run is named 'quikstart@2-cores-epyc' .*; did you mean"
    ):
        sources.load("quikstart@2-cores-epyc", tmp_path)
    with pytest.raises(ResultsError, match="there is no such file"):
        sources.load("../secret.jsonl", tmp_path)


def test_the_baseline_of_a_suite_is_that_of_the_machines_class(path: Path, tmp_path: Path, measured: Measured) -> None:
    assert sources.baseline_for(measured, tmp_path).name == "quickstart@2-cores-epyc"
    elsewhere = dataclasses.replace(measured, machine={**measured.machine, "processor": "Intel Xeon", "threads": 8})
    with pytest.raises(CannotCompare) as raised:
        sources.baseline_for(elsewhere, tmp_path)
    assert str(raised.value) == (
        f"no baseline is named 'quickstart@8-cores-xeon' in {path.parent};"
        " there are quickstart@2-cores-epyc: name one with --against"
    )
    assert raised.value.exit_code == 3


def test_a_baseline_is_removed_by_its_name(path: Path) -> None:
    with pytest.raises(ResultsError, match="did you mean 'quickstart@2-cores-epyc'"):
        baselines.remove("quickstart@2-cores-epic", path.parent)
    baselines.remove(path.stem, path.parent)
    assert baselines.names(path.parent) == []


def test_a_baseline_that_is_saved_anew_keeps_what_was_measured_of_the_machines_noise(
    path: Path, measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = Noise({_TRAIN: {"peak_live_bytes": Spread(5, 1_449_984, 542_900_224)}})
    baselines.write(dataclasses.replace(measured, noise=noise), path)
    assert cli.main(["baseline", "save", "--run", str(_KEPT), "--output", str(path.parent.parent)]) == 0
    assert baselines.read(path).noise == noise
    assert capsys.readouterr().out.splitlines()[-1] == (
        "times were measured less than 3 times: none will be called slower than these; repeats = 3 in [settings] tells,"
        " or 'membench calibrate quickstart quickstart@2-cores-epyc'"
    )
    noise = Noise({case_id: {"step_median_s": Spread(5, 0.01, 0.5)} for case_id in measured.cases})
    baselines.write(dataclasses.replace(measured, noise=noise), path)
    assert cli.main(["baseline", "save", "--run", str(_KEPT), "--output", str(path.parent.parent)]) == 0
    assert "none will be called slower" not in capsys.readouterr().out


def test_nothing_that_hangs_on_another_machine_stays_in_a_baseline(path: Path, measured: Measured) -> None:
    noise = Noise({_TRAIN: {"peak_live_bytes": Spread(5, 1_449_984, 542_900_224)}})
    other = {**measured.machine, "threads": 64}
    baselines.write(dataclasses.replace(measured, noise=noise, machine=other), path)
    kept = path.read_text()
    one = dataclasses.replace(measured, cases={_TRAIN: measured.cases[_TRAIN]})
    with pytest.raises(ResultsError) as raised:
        baselines.write_into(one, path)
    assert str(raised.value) == (
        f"{path}: {len(measured.cases) - 1} cases of it would stay, and are of another machine (threads: 64, now 2);"
        f" 'membench baseline remove {path.stem}' begins anew"
    )
    assert path.read_text() == kept
    # Nothing stays of a case that was not measured to its end before, and is not now.
    skipped = dataclasses.replace(measured.cases[_TRAIN], status="skipped", values={}, samples={})
    with_skipped = {**measured.cases, _TRAIN: skipped}
    baselines.write(dataclasses.replace(measured, noise=noise, machine=other, cases=with_skipped), path)
    assert baselines.write_into(dataclasses.replace(measured, cases=with_skipped), path).stay == 0
    baselines.write(dataclasses.replace(measured, noise=noise, machine=other), path)
    assert baselines.write_into(measured, path).stay == 0
    assert baselines.read(path).noise == Noise({})
    baselines.write(dataclasses.replace(measured, noise=noise, machine=other), path)
    baselines.write_anew(measured, path)
    assert baselines.read(path).noise == Noise({})


def test_a_baseline_of_the_first_schema_is_read_and_written_anew_as_one_of_this(tmp_path: Path) -> None:
    early = _EARLY.read_text()
    assert json.loads(early)["schema"] == 1
    read = baselines.read(_EARLY)
    on_cpu, on_gpu = "trained-tiny/none/generate/cpu", "trained-tiny/none/generate/cuda:1"
    assert {case.id: case.device for case in read.cases.values()} == {on_cpu: "cpu", on_gpu: "cuda:1"}
    # What it does not say of noise is taken from the figures beside it.
    (time_s,) = read.cases[on_cpu].values["step_median_s"]
    assert read.noise.spreads[on_cpu]["step_median_s"] == Spread(5, 0.001021, time_s)
    assert read.noise.spreads["trained-tiny/gone/generate/cpu"]["disk_bytes"] == Spread(2, 5, None)
    assert judge(read, of_run(read_run(_KEPT)), Tolerances()).pairs[0].verdict == "same"
    path = tmp_path / _EARLY.name
    baselines.write(read, path)
    assert json.loads(path.read_text())["schema"] == baseline_text.SCHEMA_VERSION == 3
    assert baselines.read(path) == read
