"""Suites as tests: collected, measured and reported in real runs of pytest."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.protocol.readings import QualityReading
from membench.records.record import Record

pytest_plugins = ["pytester"]

_SUITE = """\
[suite]
name = "every-end"

[matrix]
model = ["small"]
technique = ["none", "bf16", "idle", "raises", "dies"]
workload = ["still"]

[[include]]
model = "small"
technique = "none"
workload = "still"
device = "cuda"

[[include]]
model = "large"
technique = ["none", "bf16"]
workload = "still"

[model.small]
use = "ballast"
mib = 16

[model.large]
use = "ballast"
mib = 64

[technique.idle]
use = "ends"
how = "nothing"

[technique.raises]
use = "ends"
how = "raise"

[technique.dies]
use = "ends"
how = "kill"

[workload.still]
use = "burst"
mib = 0
hold_s = 0.02

[settings]
threads = 1
measured_steps = 3

[limits]
peak_live = "40 MiB"

[[gate.case]]
match = "large/*"
rules = ["peak_live <= 0.4 * reference"]
"""

_IDS = [
    "small/none/still/cpu", "small/bf16/still/cpu", "small/idle/still/cpu", "small/raises/still/cpu",
    "small/dies/still/cpu", "small/none/still/cuda", "large/none/still/cpu", "large/bf16/still/cpu",
]  # fmt: skip


@pytest.fixture
def suite(inner: pytest.Pytester) -> Path:
    """A suite in whose cases everything happens that can, in a folder with other files."""
    folder = inner.mkdir("suites")
    path = folder / "every-end.toml"
    path.write_text(_SUITE)
    (folder / "pyproject.toml").write_text('[project]\nname = "suite"\n\n[tool.x]\nsuite = "y"\n')
    (folder / "other.toml").write_text("[suite]\nof = 'another program'\n")
    (folder / "broken.toml").write_text("suite\n")
    inner.makepyfile("def test_it(): ...")
    return path


def _collected(inner: pytest.Pytester, *arguments: str) -> list[str]:
    ran = inner.runpytest_subprocess("--collect-only", "-q", *arguments)
    return [line.partition("::")[2] for line in ran.stdout.lines if "::" in line]


def test_each_case_is_a_test_with_its_id_for_a_name(inner: pytest.Pytester, suite: Path) -> None:
    assert sorted(_collected(inner, "suites/every-end.toml")) == sorted(_IDS)
    assert sorted(_collected(inner, "suites")) == sorted(_IDS)
    one = "suites/every-end.toml::small/bf16/still/cpu"
    assert _collected(inner, one) == ["small/bf16/still/cpu"]
    assert _collected(inner, "suites", "-k", "large and not bf16") == ["large/none/still/cpu"]
    assert _collected(inner, "suites", "-m", "gpu", "--strict-markers") == ["small/none/still/cuda"]


def test_whoever_types_pytest_alone_gets_tests_and_no_measuring(inner: pytest.Pytester, suite: Path) -> None:
    tests = ["test_it"]
    assert _collected(inner) == tests
    assert sorted(_collected(inner, ".")) == sorted([*_IDS, *tests])
    inner.makeini("[pytest]\ntestpaths = suites\n")
    assert sorted(_collected(inner)) == sorted(_IDS)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (_SUITE.replace("bf16", "bf61"), "suites/every-end.toml: matrix.technique: no technique is named 'bf61'; did*"),
        (_SUITE.replace("[matrix]", "[matrix"), "suites/every-end.toml: not valid TOML: *line 4*"),
        ('[suite]\nname = "x"\n', "suites/every-end.toml: 'matrix' is missing*"),
    ],
    ids=["wrong", "no TOML", "half"],
)
def test_a_broken_suite_that_is_named_is_one_clear_line(
    inner: pytest.Pytester, suite: Path, written: str, said: str
) -> None:
    suite.write_text(written)
    ran = inner.runpytest_subprocess("suites/every-end.toml")
    assert ran.ret == pytest.ExitCode.INTERRUPTED
    ran.assert_outcomes(errors=1)
    ran.stdout.fnmatch_lines([said])
    assert "Traceback" not in ran.stdout.str()
    assert ".py:" not in ran.stdout.str()


def test_cases_are_benchmarks_to_pytest_benchmark(inner: pytest.Pytester, suite: Path) -> None:
    inner.runpytest_subprocess(".", "-q", "--benchmark-skip").assert_outcomes(passed=1, skipped=len(_IDS))
    assert not (inner.path / "results").exists()
    only = inner.runpytest_subprocess(".", "-q", "--benchmark-only", "-k", "cuda or test_it")
    only.assert_outcomes(skipped=2, deselected=len(_IDS) - 1)
    only.stdout.fnmatch_lines(["membench: * kept in results/every-end-*.jsonl"])


def test_how_cases_end_is_how_their_tests_end(inner: pytest.Pytester, suite: Path) -> None:
    ran = inner.runpytest_subprocess("suites", "-v", "-rfs", "--junitxml=junit.xml", "--benchmark-json=times.json")
    ran.assert_outcomes(passed=3, failed=4, skipped=1, warnings=2)
    ran.stdout.fnmatch_lines(
        [
            "large/none/still/cpu: peak_live 64.* MiB is over its limit of 40.00 MiB",
        ]
    )
    ran.stdout.fnmatch_lines_random(
        [
            "small/raises/still/cpu ended as failed in phase apply: ValueError: a technique that gives up",
            "*ValueError: a technique that gives up",  # the end of what the process printed
            "small/dies/still/cpu ended as crashed in phase apply: killed by SIGKILL",
            "large/bf16/still/cpu: peak_live <= 0.4 [*] reference is broken: 32.* MiB is over 25.* MiB",
            "SKIPPED [[]1[]] suites/every-end.toml: no CUDA device here, or a torch build without CUDA",
            "FAILED suites/every-end.toml::small/dies/still/cpu - Failed: small/dies/*",
            "*MembenchWarning: small/idle/still/cpu: 'idle' changed nothing in the model",
            "*MembenchWarning: large/bf16/still/cpu: peak_live is within its limit of 40.00 MiB while running, but *",
            "membench: 8 records kept in results/every-end-*.jsonl",
        ]
    )
    assert "pytest_plugin" not in ran.stdout.str()
    run = _kept(inner)
    assert [record.status for record in run.records] == [
        dict(zip(_IDS, ["ok", "ok", "ok", "failed", "crashed", "skipped", "ok", "ok"], strict=True))[record.id]
        for record in run.records
    ]
    assert run.header["suite_text"] == _SUITE
    shown = inner.run("python", "-m", "membench", "show")
    shown.stdout.fnmatch_lines(["small · still · cpu", "*none *ok *16.00 MiB*", "kept in results/every-end-*.jsonl"])
    _check_junit(inner.path / "junit.xml", run.records)
    _check_times(inner.path / "times.json", run.records)
    failed = ["small/raises/still/cpu", "small/dies/still/cpu", "large/none/still/cpu", "large/bf16/still/cpu"]
    assert sorted(_collected(inner, "suites", "--lf")) == sorted(failed)
    (inner.path / "results").rename(inner.path / "before")
    first = inner.runpytest_subprocess("suites", "-x", "-q", "--lf", "-k", "large and bf16", "-p", "no:benchmark")
    first.assert_outcomes(failed=1, deselected=3)
    # What a case is compared with is measured although it was not asked for.
    assert [record.id for record in _kept(inner).records] == ["large/none/still/cpu", "large/bf16/still/cpu"]


def _check_junit(path: Path, records: Sequence[Record]) -> None:
    (bf16,) = (record for record in records if record.id == "small/bf16/still/cpu")
    (case,) = ElementTree.parse(path).iterfind(".//testcase[@name='small/bf16/still/cpu']")
    properties = {each.attrib["name"]: each.attrib["value"] for each in case.iter("property")}
    assert properties["peak_live_bytes"] == str(bf16.metrics["peak_live_bytes"])
    assert properties["weights_bytes"] == str(8 * 2**20)


def _check_times(path: Path, records: Sequence[Record]) -> None:
    written: Mapping[str, Any] = {each["name"]: each for each in json.loads(path.read_text())["benchmarks"]}
    (bf16,) = (record for record in records if record.id == "small/bf16/still/cpu")
    assert written.keys() == {record.id for record in records if record.status == "ok"}
    found = written["small/bf16/still/cpu"]
    # Steps that other processes disturbed are left out.
    assert found["stats"]["data"]
    assert set(found["stats"]["data"]) <= set(bf16.processes[0].durations_s or ())
    assert 0.02 <= found["stats"]["min"] < 0.1
    assert found["group"] == "small · still · cpu"
    assert found["extra_info"]["weights_bytes"] == 8 * 2**20


def _kept(inner: pytest.Pytester) -> membench.Run:
    (path,) = (inner.path / "results").glob("*.jsonl")
    return membench.read_run(path)


_LOGITS = """\
[suite]
name = "logits"

[matrix]
model = ["tiny"]
technique = ["none", "bf16"]
workload = ["short", "long"]

[model.tiny]
use = "factory"
function = "tiny:module"

[workload.short]
use = "forward"
sequence_length = 32

[workload.long]
use = "forward"
sequence_length = 64

[settings]
threads = 1
measured_steps = 1
"""

_TINY = """
def module():
    import torch
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(256, 64), torch.nn.Linear(64, 256))
"""


def _quality(run: membench.Run) -> dict[str, QualityReading | None]:
    return {record.id: record.processes[0].quality for record in run.records if record.case["workload"] == "long"}


def test_workers_of_xdist_compare_cases_with_their_references_as_membench_run_does(inner: pytest.Pytester) -> None:
    inner.makepyfile(tiny=_TINY)
    (inner.path / "logits.toml").write_text(_LOGITS)
    suite = membench.load_suite("logits.toml")
    expected = membench.run(suite, keep=lambda id: "bf16/long" in id, output="by-membench")
    of_bf16 = _quality(expected)["tiny/bf16/long/cpu"]
    assert of_bf16 is not None
    assert (of_bf16.kl_nats or 0) > 0

    inner.runpytest_subprocess("logits.toml", "-n2", "-q").assert_outcomes(passed=4)
    run = _kept(inner)
    # One file; each reference was measured once, by whichever worker needed it first.
    assert sorted(record.id for record in run.records) == sorted(case.id for case in suite.cases)
    assert _quality(run) == _quality(expected)
    assert run.header["suite_sha256"] == expected.header["suite_sha256"]
