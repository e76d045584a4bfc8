"""What CI services are told: JUnit, annotations, a job summary, and figures for those that keep a history."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from membench import cli
from membench.cli import ci
from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.regression.judging import judge
from membench.regression.measured import of_records
from membench.regression.verdict import Judgement
from membench.report import case_outcomes, formats, github, junit, regression, services
from membench.report.case_outcomes import CheckedCase
from membench.suite.gates import Outcome, parse
from membench.suite.tolerances import Tolerances
from tests import made_up

_HOSTILE = "50% of <b>it</b> | `rm`\r\n\x00\x1b[31m::set-output name=x::y, \ufffe]]>"
_CASES = [
    CheckedCase("s", "m/none/w/cpu", "passed", duration_s=1.5, notes=("a note",)),
    CheckedCase("s", "m/a/w/cpu", "failed", ("over its limit", "and worse"), duration_s=0.25),
    CheckedCase("s", "m/b/w/cpu", "unfinished", (_HOSTILE,), output="last words\x08"),
    CheckedCase("t", "m/c/w/cpu", "skipped", ("no CUDA device here",)),
]


def _record(technique: str = "none", repeat: int = 0, **changes: object) -> Record:
    case = {"model": "m", "technique": technique, "workload": "w", "device": "cpu"}
    known: dict[str, object] = {
        "case": case, "id": f"m/{technique}/w/cpu", "repeat": repeat, "status": "ok", "ended_in": None,
        "message": None, "started_at": "", "duration_s": 1.0, "metrics": {}, "reasons": {}, "obtained": {},
        "processes": (), "remarks": (), "notes": (), "broken_limits": (), "timeline": {}, "output_tail": "",
        "machine": {}, "settings": {},
    }  # fmt: skip
    return Record(**{**known, **changes})  # type: ignore[arg-type]


def test_junit_has_a_suite_a_suite_and_a_case_a_case_with_what_is_wrong_as_its_text() -> None:
    root = ElementTree.fromstring(junit.document(_CASES))
    assert [(suite.tag, dict(suite.attrib)) for suite in root] == [
        ("testsuite", {"name": "s", "tests": "3", "failures": "1", "errors": "1", "skipped": "0", "time": "1.750"}),
        ("testsuite", {"name": "t", "tests": "1", "failures": "0", "errors": "0", "skipped": "1", "time": "0.000"}),
    ]
    cases = list(root.iter("testcase"))
    found = {case.get("name"): [(child.tag, child.get("message"), child.text) for child in case] for case in cases}
    assert found["m/none/w/cpu"] == [("system-out", None, "a note")]
    assert found["m/a/w/cpu"] == [("failure", "over its limit", "over its limit\nand worse")]
    assert found["m/c/w/cpu"] == [("skipped", "no CUDA device here", None)]
    assert {case.get("classname") for case in cases} == {"membench.s", "membench.t"}


def test_junit_leaves_out_what_xml_cannot_hold() -> None:
    text = junit.document(_CASES)
    assert not [character for character in text if ord(character) < 32 and character not in "\t\n\r"]
    error = next(case for case in ElementTree.fromstring(text).iter("testcase") if case.get("name") == "m/b/w/cpu")
    assert error[0].text == "50% of <b>it</b> | `rm`\n[31m::set-output name=x::y, ]]>"
    assert error[1].text == "last words"


def test_an_annotation_is_one_command_whatever_is_in_its_text() -> None:
    failed, unfinished = github.workflow_commands(_CASES)
    assert failed == "::error title=membench%3A m/a/w/cpu::over its limit%0Aand worse"
    assert unfinished.startswith("::error title=membench%3A m/b/w/cpu::50%25 of <b>it</b>")
    assert unfinished.isprintable()
    (titled,) = github.workflow_commands([CheckedCase("s", "a,b::c%0A", "failed", ("x",))])
    assert titled == "::error title=membench%3A a%2Cb%3A%3Ac%250A::x"


def test_a_summary_says_what_failed_before_its_tables_and_takes_nothing_for_markup() -> None:
    lines = github.summary("membench run s t", _CASES, ["| a |\n|---|"]).splitlines()
    assert lines[0] == "## ❌ membench run s t: 1 passed, 2 failed, 1 skipped"
    assert lines[2:4] == ["- m/a/w/cpu: over its limit", "- m/a/w/cpu: and worse"]
    assert lines[4].startswith("- m/b/w/cpu: 50% of &lt;b&gt;it&lt;/b&gt; \\| \\`rm\\`")
    assert lines[-3:] == ["", "| a |", "|---|"]
    assert github.summary("all well", _CASES[:1], []) == "## ✅ all well: 1 passed\n\n"


def test_a_summary_stays_below_what_github_takes() -> None:
    text = github.summary("long", _CASES[:1], ["x" * 600_000, "y" * 600_000])
    assert "x" * 600_000 in text
    assert "y" not in text.partition("x" * 600_000)[2].replace("tables", "").replace("may", "").replace("summary", "")
    assert "The other tables are longer than a summary may be; see the log." in text
    many = [CheckedCase("s", f"case-{number}", "failed", ("r" * 100,)) for number in range(20_000)]
    assert len(github.summary("many", many, []).encode()) < 2**20


def test_repeats_are_one_case_with_the_worst_of_their_ends() -> None:
    records = [
        _record(),
        _record(repeat=1, status="crashed", ended_in="run", message="killed by SIGSEGV", output_tail="oops"),
        _record("a", broken_limits=("live peak over its limit",), remarks=("it changed nothing",)),
        _record("b", status="skipped", message="no CUDA device here"),
        _record("c", status="diverged", ended_in="time", message="the training loss became nan"),
    ]
    assert case_outcomes.of_records("s", records) == [
        CheckedCase("s", "m/none/w/cpu", "unfinished", ("crashed in run: killed by SIGSEGV",), (), 2.0, "oops"),
        CheckedCase("s", "m/a/w/cpu", "failed", ("live peak over its limit",), ("it changed nothing",), 1.0),
        CheckedCase("s", "m/b/w/cpu", "skipped", ("skipped: no CUDA device here",), (), 1.0),
        CheckedCase("s", "m/c/w/cpu", "failed", ("diverged in time: the training loss became nan",), (), 1.0),
    ]  # fmt: skip


def test_two_checks_of_a_case_are_told_as_one() -> None:
    first = [CheckedCase("s", "a", "failed", ("limit",), duration_s=2.0, output="o"), CheckedCase("s", "b", "passed")]
    second = [CheckedCase("s", "a", "passed", (), ("better",)), CheckedCase("s", "c", "unfinished", ("gone",))]
    assert case_outcomes.together(first, second) == [
        CheckedCase("s", "a", "failed", ("limit",), ("better",), 2.0, "o"),
        CheckedCase("s", "b", "passed"),
        CheckedCase("s", "c", "unfinished", ("gone",)),
    ]


_MEASURED = [
    _record(metrics={"weights_bytes": 100, "step_median_s": 0.5, "tokens_per_s": 64.0, "disk_bytes": None}),
    _record(repeat=1, metrics={"weights_bytes": 104, "step_median_s": 0.7, "tokens_per_s": 60.0}),
    _record("a", metrics={"weights_bytes": 50}),
    _record("b", status="failed", metrics={"weights_bytes": 1}),
]  # fmt: skip


def test_benchmark_action_gets_what_is_better_if_it_is_less_with_its_unit() -> None:
    entries = json.loads(services.benchmark_action(_MEASURED))
    assert [{key: entry[key] for key in entry if key != "extra"} for entry in entries] == [
        {"name": "m/none/w/cpu weights", "unit": "bytes", "value": 102, "range": "± 2"},
        {"name": "m/none/w/cpu time", "unit": "s", "value": 0.6, "range": "± 0.1"},
        {"name": "m/a/w/cpu weights", "unit": "bytes", "value": 50},
    ]
    assert all(isinstance(entry["extra"], str) for entry in entries)


def test_bencher_gets_a_measure_a_metric_with_its_bounds() -> None:
    assert json.loads(services.bencher(_MEASURED)) == {
        "m/none/w/cpu": {
            "weights-bytes": {"value": 102, "lower_value": 100, "upper_value": 104},
            "step-median-s": {"value": 0.6, "lower_value": 0.5, "upper_value": 0.7},
            "tokens-per-s": {"value": 62, "lower_value": 60, "upper_value": 64},
        },
        "m/a/w/cpu": {"weights-bytes": {"value": 50}},
    }
    # Both services know a measure by a slug of 64 characters at most.
    assert all(len(metric.field) <= 64 for metric in METRICS)


_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["ballast"]
technique = ["none", "bf16"]
workload = ["still"]
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 2
[limits]
weights = "40 MiB"
"""


def _membench(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "membench", *arguments],
        cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_run_in_ci_fails_and_tells_every_service_why(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(_SUITE)
    (tmp_path / "summary.md").write_text("# What other steps wrote\n")
    done = _membench(tmp_path, "run", "small.toml", "--summary", "summary.md", "--junit", "reports/junit.xml",
                     "--format", "csv", GITHUB_ACTIONS="true")  # fmt: skip
    assert done.returncode == 1
    reason = "weights 64.00 MiB is over its limit of 40.00 MiB"
    assert f"::error title=membench%3A ballast/none/still/cpu::{reason}\n" in done.stderr
    assert "::error" not in done.stdout
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# What other steps wrote\n## ❌ membench run small: 1 passed, 1 failed\n\n")
    assert f"- ballast/none/still/cpu: {reason}\n" in summary
    assert "| none        | over limit |" in summary
    root = ElementTree.parse(tmp_path / "reports" / "junit.xml").getroot()
    assert [failure.text for failure in root.iter("failure")] == [reason]
    exported = _membench(tmp_path, "export", "bencher")
    assert json.loads(exported.stdout)["ballast/bf16/still/cpu"]["weights-bytes"] == {"value": 32 * 2**20}


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(_SUITE)
    done = _membench(tmp_path, "run", "small.toml", "--junit", ".")
    assert (done.returncode, done.stderr) == (2, "membench: .: cannot be written: Is a directory\n")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("form", ["bencher", "benchmark-action"])
def test_an_export_of_a_run_without_figures_is_empty_json(form: str) -> None:
    assert json.loads(formats.EXPORTS[form]([_record(status="failed")])) in ({}, [])


@pytest.mark.parametrize("form", ["bencher", "benchmark-action"])
def test_exporting_a_run_without_figures_fails_in_one_line_and_prints_no_document(tmp_path: Path, form: str) -> None:
    # The ballast is no language model, so that its case fails in the first step.
    (tmp_path / "none.toml").write_text(
        '[suite]\nname = "none"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["forward"]\n'
    )
    assert _membench(tmp_path, "run", "none.toml").returncode == 1
    (kept,) = (tmp_path / "results").glob("*.jsonl")
    done = _membench(tmp_path, "export", form)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"membench: results/{kept.name}: nothing to export: no case has figures (ballast/none/forward/cpu failed)\n"
    )


def test_a_check_fails_for_what_got_worse_and_not_for_what_was_broken_before() -> None:
    weights = {"weights_bytes": 2**20}
    broken: dict[str, Any] = {
        "status": "out-of-memory",
        "ended_in": "run",
        "message": "killed by the kernel",
        "metrics": {},
    }
    base = [
        _record(metrics=weights),
        _record("a", metrics=weights),
        _record("b", **broken),
        _record("c", metrics=weights),
    ]
    new = [
        _record(metrics=weights, broken_limits=("weights 1.000 MiB is over its limit of 1 B",)),
        _record("a", metrics={"weights_bytes": 2**21}), _record("b", **broken), _record("c", **broken),
    ]  # fmt: skip
    judgement = _judged(base, new)
    told = {case.id: (case.end, case.reasons) for case in case_outcomes.of_check(judgement, new)}
    assert told["m/none/w/cpu"] == ("failed", ("weights 1.000 MiB is over its limit of 1 B",))
    assert told["m/a/w/cpu"][0] == "failed"
    assert told["m/a/w/cpu"][1][0].startswith("weights 1.000 MiB → 2.000 MiB (+100.0%, tolerance 1%")
    assert told["m/b/w/cpu"] == ("skipped", ("out-of-memory in run: killed by the kernel",))
    assert told["m/c/w/cpu"][0] == "unfinished"
    assert "killed by the kernel" in told["m/c/w/cpu"][1][-1]


def _judged(base: list[Record], new: list[Record]) -> Judgement:
    process = {"role": "worker", "rank": 0, "device": "cpu", "phases": []}
    before, now = (
        of_records([dataclasses.replace(record, processes=(made_up.process(**process),)) for record in side], name, "s")
        for side, name in ((base, "before"), (new, "now"))
    )
    return judge(before, now, Tolerances())


def test_a_new_case_that_ends_badly_is_not_said_to_have_ended_well_before() -> None:
    weights = {"weights_bytes": 2**20}
    crashed: dict[str, Any] = {"status": "crashed", "ended_in": "run", "message": "killed by SIGKILL", "metrics": {}}
    judgement = _judged([_record(metrics=weights)], [_record(metrics=weights), _record("a", **crashed)])
    assert judgement.exit_code == 1
    told = {case.id: (case.end, case.reasons) for case in case_outcomes.of_judgement(judgement)}
    assert told["m/a/w/cpu"] == (
        "unfinished",
        ("it is not in before, and ended badly: crashed in run: killed by SIGKILL",),
    )


def test_what_is_undecided_fails_nothing_and_is_told_everywhere() -> None:
    slower = _judged([_record(metrics={"step_median_s": 0.5})], [_record(metrics={"step_median_s": 0.9})])
    assert slower.undecided
    (case,) = case_outcomes.of_check(slower, [_record(metrics={"step_median_s": 0.9})])
    (doubt,) = case.undecided
    assert case.end == "passed"
    assert doubt.startswith("time 500 ms → 900 ms (+80.0%")
    root = ElementTree.fromstring(junit.document([case]))
    assert [(node.tag, node.text) for node in root.iter("testcase") for node in node] == [
        ("system-out", f"undecided: {doubt}"),
    ]  # fmt: skip
    lines = github.summary("check", [case], []).splitlines()
    assert lines[0] == "## ✅ check: 1 passed, 1 of them undecided"
    assert lines[2].startswith("- m/none/w/cpu: undecided: time 500 ms → 900 ms")
    (warning,) = github.workflow_commands([case])
    assert warning.startswith("::warning title=membench%3A m/none/w/cpu::undecided: time 500 ms → 900 ms (+80.0%25")


def test_names_in_a_comparisons_tables_are_text_in_markdown() -> None:
    name = "test_it.py::test[<b>a|b`c`\n&]"
    record = _record(metrics={"weights_bytes": 1}, id=name)
    judgement = _judged([record], [record])
    table = regression.table([judgement], "github")
    shown = "test\\_it.py::test\\[&lt;b&gt;a\\|b\\`c\\`\\\\n&amp;\\]"
    assert f"| {shown} " in table
    assert len(table.splitlines()) == 3
    assert regression.table([judgement]).splitlines()[2].startswith("test_it.py::test[<b>a|b`c`\\n&] ")
    assert f"| {shown} " in regression.figures(judgement.new, "github")
    outcome = Outcome(name, parse("weights <= 1 B"), True)
    assert f"| {shown} " in regression.gates([outcome], "github")
    assert "| weights &lt;= 1 B " in regression.gates([outcome], "github")


def test_a_case_that_is_not_measured_any_more_is_told_as_such() -> None:
    weights = {"weights_bytes": 1}
    judgement = _judged([_record(metrics=weights), _record("a", metrics=weights)], [_record(metrics=weights)])
    assert judgement.exit_code == 3
    assert [(case.id, case.end) for case in case_outcomes.of_judgement(judgement)] == [
        ("m/none/w/cpu", "passed"), ("m/a/w/cpu", "unfinished"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "no-such-suite"], 2, "no suite is named 'no-such-suite'"),
        (["run", "small.toml", "--against-ref", "HEAD"], 2, "is in no git repository"),
        (["check", "small.toml"], 3, "no baseline is named 'small@"),
        (["check", "results/none.jsonl"], 2, "there is no such file"),
    ],
)
def test_a_check_that_cannot_be_done_leaves_files_that_say_so(
    tmp_path: Path, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    Path("small.toml").write_text(_SUITE)
    Path("junit.xml").write_text("that of an earlier run")
    assert cli.main([*arguments, "--junit", "junit.xml", "--summary", "summary.md"]) == code
    (error,) = ElementTree.parse("junit.xml").getroot().iter("error")
    assert said in str(error.get("message"))
    assert Path("summary.md").read_text().startswith(f"## ❌ membench {arguments[0]} {arguments[1]}: 1 failed\n")
    *_, annotation, last = capsys.readouterr().err.splitlines()
    assert annotation.startswith("::error title=membench%3A ")
    assert last.startswith("membench: ")


def test_an_interrupted_run_leaves_files_that_say_so(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(_SUITE)
    command = [sys.executable, "-m", "membench", "run", "small.toml", "--junit", "junit.xml", "--summary", "summary.md"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "ballast/none" in process.stderr.readline()  # the first of two cases is done
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    (error,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("error")
    assert error.get("message") == "interrupted"
    assert (tmp_path / "summary.md").read_text().startswith("## ❌ membench run small: 1 failed\n")


def test_an_interrupted_check_leaves_files_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("membench.cli.regression._check", interrupted)
    assert cli.main(["check", "small", "--junit", str(tmp_path / "junit.xml")]) == 130
    (error,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("error")
    assert error.get("message") == "interrupted"


def test_looking_whether_a_file_can_be_written_leaves_none(tmp_path: Path) -> None:
    arguments = argparse.Namespace(summary=tmp_path / "new" / "summary.md", junit=tmp_path / "junit.xml")
    arguments.junit.write_text("as it was")
    ci.refuse_unwritable(arguments)
    assert not arguments.summary.exists()
    assert arguments.junit.read_text() == "as it was"
