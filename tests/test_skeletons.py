"""``membench new``: packages that install, pass their tests and run as they are written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from membench.cli import main
from membench.cli.new import KINDS
from tests.fresh_environment import FreshEnvironment


def test_a_new_package_of_each_kind_installs_passes_its_tests_and_runs_its_suite(
    fresh: FreshEnvironment, tmp_path: Path
) -> None:
    written = fresh.run("\n".join(f"membench new {kind} own-{kind} --into new" for kind in KINDS), tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    assert written.stdout.splitlines()[:7] == [
        "new/membench-own-technique/pyproject.toml",
        "new/membench-own-technique/README.md",
        "new/membench-own-technique/src/membench_own_technique/__init__.py",
        "new/membench-own-technique/src/membench_own_technique/layers.py",
        "new/membench-own-technique/tests/test_membench_own_technique.py",
        "new/membench-own-technique/own-technique.toml",
        "next: cd new/membench-own-technique && pip install -e '.[test]' && pytest && membench run own-technique.toml",
    ]
    installed = fresh.run(f"pip install {' '.join(f'-e new/membench-own-{kind}[test]' for kind in KINDS)}", tmp_path)
    assert installed.returncode == 0, installed.stderr
    tested = fresh.run(
        f"pytest -q -p no:cacheprovider {' '.join(f'new/membench-own-{kind}/tests' for kind in KINDS)}", tmp_path
    )
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout.splitlines()[-1]
    assert "skipped" not in tested.stdout.splitlines()[-1]
    suites = [f"new/membench-own-{kind}/own-{kind}.toml" for kind in KINDS if kind != "suite"]
    few = "-k 'not bf16 and not float16 and not train'"  # the others take no other way
    ran = fresh.run(f"membench run {' '.join(suites)} own-suite {few} --format csv", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [row for row in csv.reader(ran.stdout.splitlines()) if row[0] != "case"]
    assert [row[:2] for row in rows] == [
        ["llama-15m/none/forward/cpu", "ok"],
        ["llama-15m/own-technique/forward/cpu", "ok"],
        ["own-model/none/forward/cpu", "ok"],
        ["llama-15m/none/own-workload/cpu", "ok"],
        ["llama-15m/none/forward/cpu", "ok"],
    ]


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("technique", "bf16", "there is a technique named 'bf16' already; choose another name"),
        ("model", "llama-15m", "there is a model named 'llama-15m' already; choose another name"),
        ("suite", "quickstart", "there is a suite named 'quickstart' already; choose another name"),
        (
            "model",
            "Half",
            "'Half' cannot name a model: lower-case letters and digits, in words joined by '-', the first",
        ),
        ("model", "half_linear", "'half_linear' cannot name a model: lower-case letters and digits, in words joined"),
        ("model", "a\nb", "'a\\nb' cannot name a model: lower-case"),
        ("model", "../half", "'../half' cannot name a model: lower-case"),
        ("model", "none", "'none' cannot name a model: its class would be called None"),
        ("model", "a" * 65, "cannot name a model: a name has 64 bytes at most"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_in_one_line(
    kind: str, name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", kind, name, "--into", str(tmp_path)]) == 2
    output, errors = capsys.readouterr()
    assert (output, len(errors.splitlines())) == ("", 1)
    assert said in errors
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "membench-half").mkdir()
    (tmp_path / "file").write_text("mine")
    assert main(["new", "technique", "half", "--into", str(tmp_path)]) == 2
    assert main(["new", "technique", "half", "--into", str(tmp_path / "file")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"membench: {tmp_path}/membench-half is there already; nothing was written"
    assert second == f"membench: {tmp_path}/file/membench-half cannot be made: Not a directory"
    assert list((tmp_path / "membench-half").iterdir()) == []
