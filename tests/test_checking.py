"""compare, check and baseline as their user meets them: real processes, exit codes, files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from membench import cli
from membench.records.run_file import read_run

_KEPT = Path(__file__).parent.parent / "results" / "quickstart@2-cores-epyc.jsonl"
_NAME = "quickstart@2-cores-epyc"

_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["some"]
technique = ["none", "bf16"]
workload = ["still"]
[model.some]
use = "ballast"
mib = MIB
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
[regression]
time = "off"
[gate]
rules = ["weights <= 0.5 * reference"]
"""


def _read(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A verb that only reads and writes files, in this process: starting one takes longer than what it does."""
    told = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(told["stdout"]),
            contextlib.redirect_stderr(told["stderr"]),
        ):
            code = cli.main(arguments)
    finally:
        signal.signal(signal.SIGTERM, on_term)
    return subprocess.CompletedProcess(arguments, code, told["stdout"].getvalue(), told["stderr"].getvalue())


def _membench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "membench", *arguments],
        cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder whose results hold a kept run."""
    (tmp_path / "results").mkdir()
    shutil.copy(_KEPT, tmp_path / "results")
    return tmp_path


def _slower(folder: Path, name: str = "slower") -> Path:
    """The kept run, with 3% more weights in one case."""
    lines = _KEPT.read_text().splitlines()
    for number, line in enumerate(lines[1:], 1):
        entry = json.loads(line)
        if entry["id"] == "llama-60m/none/train/cpu":
            entry["metrics"]["weights_bytes"] = int(entry["metrics"]["weights_bytes"] * 1.03)
            lines[number] = json.dumps(entry)
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_run_is_kept_as_a_baseline_listed_shown_and_removed(kept: Path) -> None:
    saved = _read("baseline", "save", "--run", _NAME, folder=kept)
    path = Path("results", "baselines", f"{_NAME}.json")
    first, second = saved.stdout.splitlines()
    assert (saved.returncode, first) == (0, f"{path}: 13 cases of {_NAME}")
    assert second.startswith("times were measured less than 3 times: none will be called slower")
    assert _read("baseline", "list", folder=kept).stdout == (
        f"{_NAME}  13 cases  2026-11-24  commit not known  noise not known\n"
    )
    rows = csv.DictReader(io.StringIO(_read("baseline", "show", _NAME, "--format", "csv", folder=kept).stdout))
    assert {row["case"]: row["weights_bytes"] for row in rows}["llama-60m/none/train/cpu"] == "232294656"
    assert _read("baseline", "remove", _NAME, folder=kept).returncode == 0
    assert not (kept / path).exists()
    gone = _read("baseline", "show", _NAME, folder=kept)
    assert (gone.returncode, gone.stderr) == (
        2, f"membench: results/baselines: no baseline is named '{_NAME}'; none is known\n",
    )  # fmt: skip


def test_what_is_the_same_exits_with_0_and_what_regressed_with_1_and_a_line_that_says_what(kept: Path) -> None:
    same = _read("check", _NAME, "--against", _NAME, folder=kept)
    assert same.returncode == 0
    assert same.stdout.splitlines()[-1] == (
        f"{_NAME} against {_NAME}: nothing regressed; 103 figures of 13 cases watched"
    )
    worse = _read("check", str(_slower(kept)), "--against", _NAME, folder=kept)
    assert worse.returncode == 1
    assert (
        "regressed: llama-60m/none/train/cpu: weights 221.5 MiB → 228.2 MiB (+3.0%, tolerance 1%)"
        in worse.stdout.splitlines()
    )
    allowed = _read("check", str(_slower(kept)), "--against", _NAME, "--fail", "llama-60m/*:weights:5%", folder=kept)
    assert allowed.returncode == 0


def _with_rules(path: Path, rules: str) -> Path:
    """A run of which the suite states rules."""
    header, *records = path.read_text().splitlines()
    entry = json.loads(header)
    entry["suite_text"] += rules
    path.write_text("\n".join([json.dumps(entry), *records]) + "\n")
    return path


def test_compare_takes_the_tolerances_of_the_suite_as_check_does(kept: Path) -> None:
    path = _slower(kept)
    assert "×1.030 regressed" in _read("compare", _NAME, str(path), folder=kept).stdout
    _with_rules(path, '\n[regression]\nweights = "5%"\n')
    compared = _read("compare", _NAME, str(path), folder=kept)
    assert "regressed" not in compared.stdout.replace("nothing regressed", "")
    assert "nothing regressed" in compared.stdout


def test_only_the_gates_and_limits_of_what_k_chooses_are_judged_and_the_rest_is_named(kept: Path) -> None:
    path = _with_rules(_slower(kept, _NAME), '\n[gate]\nrules = ["weights <= 300 KiB"]\n')
    asked = ["check", str(path), "--against", f"results/{_NAME}.jsonl", "--junit", "junit.xml"]
    chosen = _read(*asked, "-k", "trained-tiny and bf16 and generate", folder=kept)
    assert chosen.returncode == 0, chosen.stdout
    assert "not judged, since -k leaves it out: weights <= 300 KiB in llama-60m/none/forward/cpu, " in chosen.stdout
    assert "is broken" not in chosen.stdout
    assert (kept / "junit.xml").read_text().count("<testcase") == 1
    broken = _read(*asked, "-k", "trained-tiny and none and generate", folder=kept)
    assert broken.returncode == 1
    assert "trained-tiny/none/generate/cpu: weights <= 300 KiB is broken: 481.3 KiB is over 300.0 KiB" in broken.stdout


def _at_a_slower_pace(folder: Path, case_id: str, by: float) -> None:
    """The kept run, with longer steps in one case."""
    lines = _KEPT.read_text().splitlines()
    for number, line in enumerate(lines[1:], 1):
        entry = json.loads(line)
        if entry["id"] == case_id:
            process = entry["processes"][0]
            process["durations_s"] = [each * by for each in process["durations_s"]]
            entry["metrics"]["step_median_s"] *= by
            lines[number] = json.dumps(entry)
    (folder / "slowed.jsonl").write_text("\n".join(lines) + "\n")


def test_a_time_measured_once_fails_beyond_calibrated_noise_and_is_undecided_without_it(kept: Path) -> None:
    case = "llama-60m/none/train/cpu"
    _at_a_slower_pace(kept, case, 1.2)
    _read("baseline", "save", "main", "--run", _NAME, folder=kept)
    undecided = _read("check", "slowed.jsonl", "--against", "main", folder=kept)
    assert undecided.returncode == 0
    line, advice = undecided.stdout.splitlines()[-3:-1]
    assert line.startswith(f"undecided: {case}: time 752 ms → 903 ms (+20.0% [")
    assert "measured once, which a busy machine can look like" in line
    assert "'membench calibrate SUITE [NAME]' keep this machine's noise" in advice
    # As calibrating leaves it.
    path = kept / "results" / "baselines" / "main.json"
    content = json.loads(path.read_text())
    content["noise"] = {case: {"step_median_s": {"runs": 5, "range": 0.03, "median": 0.75}}}
    path.write_text(json.dumps(content))
    regressed = _read("check", "slowed.jsonl", "--against", "main", folder=kept)
    assert regressed.returncode == 1
    assert "tolerance 10%, noise of this machine 7.6%" in regressed.stdout
    assert "each was measured once; 'membench check quickstart' runs the suite" in regressed.stdout
    assert _read("check", _NAME, "--against", "main", folder=kept).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", _NAME, "--against", "quikstart@2-cores-epyc"], f"did you mean '{_NAME}'?"),
        (["check", _NAME, "--against", _NAME, "--fail", "peek_live:2%"], "did you mean 'peak_live'?"),
        (["check", _NAME, "--against", _NAME, "--fail", "lama*:time:2%"], "tolerance 'lama*:time:2%' fits no case"),
        (["check", "../../etc/passwd", "--against", _NAME], "there is no such file"),
        (["check", _NAME, "--against", _NAME, "--update"], f"--update moves a baseline, and '{_NAME}' is none"),
        (["compare", _NAME, "no\x1b[2Jthing"], "is neither a file nor the name of a run or a baseline"),
        (["baseline", "save", "../up"], "'../up' is no name for a baseline"),
    ],
)
def test_bad_use_is_one_line_and_exits_with_2(arguments: list[str], message: str, kept: Path) -> None:
    ran = _read(*arguments, folder=kept)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert ran.stderr.startswith("membench: ")
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.strip().isprintable()


def test_what_cannot_be_compared_exits_with_3(kept: Path) -> None:
    no_baseline = _read("check", _NAME, folder=kept)
    assert no_baseline.returncode == 3
    assert f"no baseline is named '{_NAME}'" in no_baseline.stderr
    lines = _KEPT.read_text().splitlines()
    (kept / "less.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    missing = _read("check", "less.jsonl", "--against", _NAME, folder=kept)
    assert missing.returncode == 3
    assert "not measured now: llama-60m/bf16/train/cpu" in missing.stdout
    (kept / "elsewhere.jsonl").write_text(_KEPT.read_text().replace('"processor":"AMD EPYC"', '"processor":"Other"'))
    asked = ["check", "elsewhere.jsonl", "--against", _NAME, "--fail", "time:10%"]
    elsewhere = _read(*asked, folder=kept)
    assert elsewhere.returncode == 3
    assert "not judged: time of 13 cases: the machines differ in processor: AMD EPYC, now Other" in elsewhere.stdout
    assert _read(*asked, "--across-machines", folder=kept).returncode == 0


def test_several_runs_stand_beside_the_base_a_column_each(kept: Path) -> None:
    _slower(kept / "results")
    ran = _read("compare", _NAME, _NAME, "slower", "--format", "github", folder=kept)
    assert ran.returncode == 0
    header, _, *rows = ran.stdout.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "case", "figure", _NAME, f"{_NAME} (2)", "slower",
    ]  # fmt: skip
    weights = next(row for row in rows if "llama-60m/none/train/cpu" in row)
    assert [cell.strip() for cell in weights.strip("|").split("|")][2:] == [
        "221.5 MiB", "221.5 MiB ×1.000", "228.2 MiB ×1.030 regressed",
    ]  # fmt: skip


def test_what_machines_read_holds_every_figure_and_nothing_else(kept: Path) -> None:
    _slower(kept / "results")
    ran = _read("compare", _NAME, "slower", "--format", "json", folder=kept)
    rows = json.loads(ran.stdout)
    (row,) = (r for r in rows if r["verdict"] == "regressed")
    assert (row["case"], row["metric"], row["base_value"]) == ("llama-60m/none/train/cpu", "weights_bytes", 232294656)
    assert row["ratio"] == pytest.approx(1.03)
    timed = [r for r in rows if r["metric"] == "step_median_s"]
    assert len(timed) == 13
    assert all(r["ratio_low"] <= 1 <= r["ratio_high"] for r in timed)
    assert list(csv.DictReader(io.StringIO(_read("compare", _NAME, "slower", "--format", "csv", folder=kept).stdout)))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite and its baseline, both of 64 MiB."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "small.toml").write_text(_SUITE.replace("MIB", "64"))
    assert _membench("run", "small.toml", folder=folder).returncode == 0
    assert _membench("baseline", "save", folder=folder).returncode == 0
    return folder


def _baseline(folder: Path) -> Path:
    (path,) = (folder / "results" / "baselines").glob("small@*.json")
    return path


def test_a_suite_that_grew_is_measured_again_before_it_fails_and_its_baseline_stays(checked: Path) -> None:
    before = _baseline(checked).read_bytes()
    (checked / "small.toml").write_text(_SUITE.replace("MIB", "66"))
    ran = _membench("check", "small.toml", "--update", folder=checked)
    assert ran.returncode == 1
    assert (
        "regressed: some/none/still/cpu: weights 64.00 MiB → 66.00 MiB (+3.1%, tolerance 1%):"
        " +2.000 MiB weights of the model itself" in ran.stdout.splitlines()
    )
    assert _baseline(checked).read_bytes() == before
    newest = max((checked / "results").glob("small-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert Counter(record.id for record in read_run(newest).records) == {
        "some/none/still/cpu": 4, "some/bf16/still/cpu": 4,
    }  # fmt: skip
    outcomes = [
        line.split() for line in ran.stdout.splitlines() if line.startswith("some/bf16") and "reference" in line
    ]
    assert [line[-5:] for line in outcomes] == [["holds", "33.00", "MiB", "33.00", "MiB"]]


def test_a_suite_that_shrank_is_better_and_moves_its_baseline(checked: Path) -> None:
    (checked / "small.toml").write_text(_SUITE.replace("MIB", "62"))
    ran = _membench("check", "small.toml", "--update", folder=checked)
    assert ran.returncode == 0, ran.stdout
    assert "better: some/none/still/cpu: weights 64.00 MiB → 62.00 MiB (-3.1%, tolerance 1%)" in ran.stdout
    kept = json.loads(_baseline(checked).read_text())
    assert kept["cases"]["some/none/still/cpu"]["values"]["weights_bytes"] == [62 * 2**20]


def test_a_broken_gate_fails_a_run(checked: Path) -> None:
    (checked / "gated.toml").write_text(
        _SUITE.replace("MIB", "8").replace('"small"', '"gated"').replace("0.5 * ref", "0.4 * ref")
    )
    ran = _membench("run", "gated.toml", folder=checked)
    assert ran.returncode == 1
    assert (
        "some/bf16/still/cpu: weights <= 0.4 * reference is broken: 4.000 MiB is over 3.200 MiB"
        in ran.stdout.splitlines()
    )
