"""Limits and gates that were not checked (a skipped case, an unknown figure) do not pass; reports say what broke."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import membench
from membench import cli
from membench.records.keepable import keepable
from membench.records.metrics import metrics_by_name
from membench.records.record import Record
from membench.report import documents, page, phase_table, summary, timeline
from membench.suite.gates import outcomes, parse
from membench.suite.limits import on_no_figure

from .made_up import MIB, process, record, run

pytest_plugins = ["pytester"]

_NOWHERE = "cuda:9"
_SUITE = """\
[suite]
name = "small"
[matrix]
model = ["ballast"]
technique = ["none", "bf16"]
workload = ["still"]
device = ["cuda:9"]
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
"""
_LIMITS = '[limits]\nweights = "40 MiB"\n'
_GATES = '[gate]\nrules = ["weights <= 0.6 * reference"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a suite whose cases were all skipped, with limits and a gate."""
    folder = tmp_path_factory.mktemp("skipped")
    (folder / "small.toml").write_text(_SUITE + _LIMITS + _GATES)
    membench.run(membench.load_suite(folder / "small.toml"), output=folder / "results")
    return folder


def test_a_run_whose_rules_were_not_checked_for_skipped_cases_exits_with_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, output = tmp_path / "small.toml", ["--output", str(tmp_path), "--junit", str(tmp_path / "junit.xml")]
    suite.write_text(_SUITE + _LIMITS + _GATES)
    summary_file = tmp_path / "summary.md"
    assert cli.main(["run", str(suite), *output, "--summary", str(summary_file), "--annotations"]) == 3
    told = capsys.readouterr()
    lines = told.out.splitlines()
    for technique in ("none", "bf16"):
        assert (
            f"ballast/{technique}/still/{_NOWHERE}: the limit on weights was not checked: the case was skipped" in lines
        )
    gate = f"ballast/bf16/still/{_NOWHERE}: weights <= 0.6 * reference was not checked: the case ended as skipped"
    assert gate in lines
    assert lines[-1] == ("3 limits and gates were not checked: exit code 3, unless --allow-skipped is given")
    assert told.err.count("::error title=membench%3A ballast/") == 2
    assert summary_file.read_text().startswith("## ❌ membench run small: 2 failed")
    ends = [[end.tag for end in case] for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")]
    assert ends == [["error"], ["error"]]

    assert cli.main(["run", str(suite), *output, "--allow-skipped"]) == 0
    assert "3 limits and gates were not checked: which --allow-skipped passes" in (capsys.readouterr().out)
    ends = [[end.tag for end in case] for case in ElementTree.parse(tmp_path / "junit.xml").iter("testcase")]
    assert ends == [["skipped"], ["skipped"]]


def test_a_check_of_a_kept_run_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (folder / "results").glob("*.jsonl")
    run = membench.read_run(path)
    # A base of the same cases, in which they were measured, and one in which they were not.
    ok = [dataclasses.replace(one, status="ok", message=None, metrics={"weights_bytes": MIB}) for one in run.records]
    base = folder / "base.jsonl"
    header, *_ = path.read_text().splitlines(keepends=True)
    base.write_text(header + "".join(keepable(one)[1].decode() for one in ok))
    assert cli.main(["check", str(path), "--against", str(base)]) == 3
    told = capsys.readouterr().out
    assert "3 limits and gates were not checked: exit code 3" in told
    assert cli.main(["check", str(base), "--against", str(base)]) == 1  # the gate is broken, and nothing was skipped
    assert "weights <= 0.6 * reference is broken" in capsys.readouterr().out


def test_a_skipped_reference_leaves_a_gate_unchecked() -> None:
    skipped = dataclasses.replace(record("none"), status="skipped", message="no GPU")
    (outcome,) = outcomes([parse("weights <= 0.6 * reference")], [skipped, record("a", weights_bytes=MIB)])
    assert (outcome.holds, outcome.is_unchecked, outcome.reason) == (None, True, "the reference ended as skipped")
    crashed = dataclasses.replace(skipped, status="crashed")
    (outcome,) = outcomes([parse("weights <= 0.6 * reference")], [crashed, record("a", weights_bytes=MIB)])
    assert (outcome.holds, outcome.is_unchecked) == (None, False)


def test_a_gate_on_an_unknown_figure_is_not_checked_and_one_on_a_disturbed_time_is_a_warning() -> None:
    unknown = dataclasses.replace(record("a", weights_bytes=None), reasons={"weights_bytes": "nobody counted"})
    (outcome,) = outcomes([parse("weights <= 1 GiB")], [unknown])
    assert (outcome.holds, outcome.is_unchecked) == (None, True)
    assert outcome.sentence().endswith("was not checked: weights of the case is not known: nobody counted")
    (of_nothing,) = outcomes([parse("energy <= 1")], [record("a", weights_bytes=MIB)])
    assert (of_nothing.reason, of_nothing.is_unchecked) == ("no case here has these figures", True)
    waited = process(durations_s=[1.0], waited_s=[2.0])
    busy = dataclasses.replace(record("a", step_median_s=1.0), processes=(waited,))
    (disturbed,) = outcomes([parse("time <= 2 s")], [busy])
    assert (disturbed.holds, disturbed.is_unchecked) == (None, False)


def test_a_limit_on_an_unknown_figure_exits_with_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = tmp_path / "small.toml"
    (tmp_path / "told.py").write_text(
        "from membench.plugins import QualityMetric\n\n\nclass Told(QualityMetric):\n"
        "    def measure(self, module, held_out, context):\n        return 1.0\n"
    )
    suite.write_text(
        '[suite]\nname = "small"\nplugins = ["told.py"]\nmetrics = ["told"]\n'
        '[matrix]\nmodel = ["tiny"]\ntechnique = ["none"]\nworkload = ["forward"]\n'
        '[model.tiny]\nuse = "factory"\nfunction = "membench.testing:tiny_module"\n'
        "[settings]\nthreads = 1\nmeasured_steps = 1\nevaluate_s = 0\n[limits]\ntold = 3\n"
    )
    words = ["run", str(suite), "--output", str(tmp_path)]
    assert cli.main(words) == 3
    (made,) = membench.read_run(membench.newest_run(tmp_path)).records
    (limit,) = made.unchecked_limits
    assert limit.endswith("on told was not checked: quality was not judged: evaluate_s = 0")
    assert made.status == "ok"
    told = capsys.readouterr().out
    assert "ok, see below" in told
    assert f"\ntiny/none/forward/cpu: {limit}\n" in told
    assert told.endswith("\n1 limit or gate was not checked: exit code 3, unless --allow-skipped is given\n")
    assert cli.main(["show", "--output", str(tmp_path)]) == 0
    assert limit in capsys.readouterr().out
    overview = summary.overview(membench.read_run(membench.newest_run(tmp_path)))
    assert ": 1 case, 1 ok, 1 limit or gate not checked." in overview


_OF_ANOTHER_WORKLOAD = (
    "the limit on decode_tokens_per_s was not checked: no case here has this figure",
    "*: first_token <= 1 s was not checked: no case here has these figures",
)


@pytest.fixture(scope="module")
def of_no_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite whose limit and gate are on figures that none of its cases has."""
    folder = tmp_path_factory.mktemp("of_no_case")
    (folder / "small.toml").write_text(
        '[suite]\nname = "small"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["still"]\n'
        '[workload.still]\nuse = "burst"\nmib = 0\n[settings]\nthreads = 1\nmeasured_steps = 1\n'
        '[limits]\ndecode_tokens_per_s = 20\n[gate]\nrules = ["first_token <= 1 s"]\n'
    )
    return folder


def test_a_limit_on_what_no_case_has_exits_with_three(of_no_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite, output = of_no_case / "small.toml", ["--output", str(of_no_case / "results")]
    junit = of_no_case / "junit.xml"
    assert cli.main(["run", str(suite), *output, "--junit", str(junit)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert all(told in lines for told in _OF_ANOTHER_WORKLOAD)
    assert lines[-1] == "2 limits and gates were not checked: exit code 3, unless --allow-skipped is given"
    ends = {case.attrib["name"]: [end.tag for end in case] for case in ElementTree.parse(junit).iter("testcase")}
    assert ends == {"limits and gates": ["error"], "ballast/none/still/cpu": ["system-out"]}
    (kept,) = (of_no_case / "results").glob("*.jsonl")
    assert "1 ok, 2 limits and gates not checked." in summary.overview(membench.read_run(kept))
    assert cli.main(["check", str(kept), "--against", str(kept)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert all(told in lines for told in _OF_ANOTHER_WORKLOAD)
    assert cli.main(["check", str(kept), "--against", str(kept), "--allow-skipped"]) == 0


def test_a_limit_on_what_other_cases_have_says_nothing_of_those_that_lack_it() -> None:
    field = metrics_by_name()["decode_tokens_per_s"].field
    records = record("a"), record("b", decode_tokens_per_s=20.0)
    assert on_no_figure([field], records) == []
    assert on_no_figure([field], records[:1]) == [_OF_ANOTHER_WORKLOAD[0]]
    assert on_no_figure([field], [dataclasses.replace(records[0], status="crashed")]) == []


def test_pytest_ends_with_three_where_no_case_has_the_figures_of_a_rule(
    inner: pytest.Pytester, of_no_case: Path
) -> None:
    (inner.path / "small.toml").write_text((of_no_case / "small.toml").read_text())
    ran = inner.runpytest_subprocess("small.toml", "-q")
    ran.assert_outcomes(passed=1)
    assert ran.ret == 3
    assert all(f"membench: {told}" in ran.outlines for told in _OF_ANOTHER_WORKLOAD)


_GATED = '[suite]\nname = "made-up"\n[gate]\nrules = ["weights <= 0.6 * reference"]\n'


def _over(technique: str) -> Record:
    return dataclasses.replace(
        record(technique, weights_bytes=MIB), broken_limits=("weights 1.000 MiB is over its limit of 1 B",)
    )


@pytest.mark.parametrize(
    ("records", "text", "told"),
    [
        ((record("none"), record("a")), "", "2 cases, all ok."),
        ((record("none"), _over("a")), "", "2 cases, 1 ok, 1 over limit."),
        ((_over("none"),), "", "1 case, 1 over limit."),
        ((record("none", weights_bytes=MIB), record("a", weights_bytes=MIB)), _GATED, "2 cases, 2 ok, 1 gate broken."),
        (
            (record("none", weights_bytes=MIB), dataclasses.replace(record("a"), status="skipped")),
            _GATED,
            "2 cases, 1 ok, 1 skipped, 1 limit or gate not checked.",
        ),
    ],
)
def test_no_report_says_all_ok_where_a_limit_or_a_gate_is_broken(
    records: tuple[Record, ...], text: str, told: str
) -> None:
    made = run(records, suite_text=text) if text else run(records)
    assert f": {told}" in summary.overview(made)
    documented = documents.markdown_document([made]), documents.latex_document([made]), page.page([made])
    assert [("all ok" in document) for document in documented] == ["all ok" in told] * 3
    if "gate broken" in told:
        assert all("reference is broken: 1.000 MiB is over" in document for document in documented)


def test_no_table_or_picture_of_one_case_says_ok_where_its_limit_is_broken() -> None:
    phases = ({"name": "run", "began_s": 0.0, "ended_s": 1.0, "duration_s": 1.0},)
    over = dataclasses.replace(_over("a"), processes=(process(phases=phases),))
    assert phase_table.phases([over]).startswith("m/a/forward/cpu · over limit\n")
    assert "ended as over limit" in timeline.timeline(over, 1).caption


def test_show_names_broken_gates_and_the_progress_cases_over_their_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "small.toml"
    suite.write_text(_SUITE.replace(_NOWHERE, "cpu") + _LIMITS + '[gate]\nrules = ["weights <= 0.4 * reference"]\n')
    assert cli.main(["run", str(suite), "--output", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("over limit     ballast/none/still/cpu  ")
    assert second.startswith("ok             ballast/bf16/still/cpu  ")
    assert cli.main(["show", "--output", str(tmp_path)]) == 0
    assert "ballast/bf16/still/cpu: weights <= 0.4 * reference is broken: 32.00 MiB is over 25.60 MiB" in (
        capsys.readouterr().out
    )


def test_pytest_ends_with_three_where_rules_were_not_checked(inner: pytest.Pytester) -> None:
    (inner.path / "small.toml").write_text(_SUITE + _LIMITS + _GATES)
    ran = inner.runpytest_subprocess("small.toml", "-q")
    ran.assert_outcomes(skipped=2)
    assert ran.ret == 3
    gate = f"ballast/bf16/still/{_NOWHERE}: weights <= 0.6 * reference was not checked: the case ended as skipped"
    assert f"membench: {gate}" in ran.outlines
    assert (
        f"membench: ballast/none/still/{_NOWHERE}: the limit on weights was not checked: the case was skipped"
        in ran.outlines
    )
    assert "membench: exit code 3 for what was not checked, unless --membench-allow-skipped" in ran.outlines
    assert inner.runpytest_subprocess("small.toml", "-q", "--membench-allow-skipped").ret == 0
