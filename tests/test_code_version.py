"""The commit of the code under test: in runs of suites, scripts and tests, and in what is shown of them."""

from __future__ import annotations

import dataclasses
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import membench
from membench import cli
from membench.errors import ResultsError
from membench.host import code_version as module
from membench.host.code_version import code_version
from membench.report import history, page, summary

from .made_up import MIB, record, run
from .repositories import commit, git

pytest_plugins = ["pytester"]

_SUITE = """\
[suite]
name = "still"
[matrix]
model = ["small"]
technique = ["none"]
workload = ["still"]
[model.small]
use = "ballast"
mib = 1
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A repository of one commit, with a suite in a folder of it."""
    folder = tmp_path / "here"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, "The suite", {"benchmarks/still.toml": _SUITE, ".gitignore": "results\n"})
    return folder


def test_the_commit_of_a_folder_is_known_with_its_time_and_whether_files_differ(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as hooks set it for another repository
    found = code_version(here / "benchmarks")
    assert (found.commit, found.is_changed, found.reason) == (git_head(here), False, None)
    assert abs(time.time() - datetime.fromisoformat(str(found.committed_at)).timestamp()) < 600
    (here / "new.py").write_text("")
    assert code_version(here) == found  # git does not track it
    (here / "benchmarks/still.toml").write_text(f"{_SUITE}\n")
    assert code_version(here) == dataclasses.replace(found, is_changed=True)


def git_head(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GIT_DIR", raising=False)
        return git(folder, "rev-parse", "HEAD")


def test_where_no_commit_is_known_the_reason_is(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_version(tmp_path).reason == f"{tmp_path} is in no git repository"
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "--quiet")
    empty = code_version(tmp_path / "empty")
    assert empty.commit is None
    assert "HEAD" in str(empty.reason)
    package = here / ".venv/lib/python3/site-packages/package"
    package.mkdir(parents=True)
    assert code_version(package).reason == f"{package} is part of an installed package"
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "git"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert code_version(here).reason == "git log did not end within 0.2 s"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(here).reason == "git is not installed"


def test_a_run_has_the_commit_of_its_suites_repository_and_is_not_resumed_at_another(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = membench.load_suite(here / "benchmarks/still.toml")
    monkeypatch.chdir(tmp_path)
    begun = membench.run(suite, keep=lambda _: False, output=tmp_path)
    first = git_head(here)
    assert (begun.header["code"]["commit"], begun.header["code"]["is_changed"]) == (first, False)
    assert begun.header["machine"]["commit"] != first  # that is membench's own
    (here / ".gitignore").write_text("results\n*.pyc\n")
    assert membench.resumable(suite, tmp_path) == begun.path
    second = commit(here, "Ignore more", {"model.py": ""})
    for refused in (
        lambda: membench.resumable(suite, tmp_path),
        lambda: membench.run(suite, output=tmp_path, resume=True),
    ):
        with pytest.raises(ResultsError, match=f"began at commit {first[:12]}, and {second[:12]} is checked out"):
            refused()


def test_a_suite_in_no_repository_says_so(tmp_path: Path) -> None:
    (tmp_path / "still.toml").write_text(_SUITE)
    begun = membench.run(membench.load_suite(tmp_path / "still.toml"), keep=lambda _: False, output=tmp_path)
    assert begun.header["code"]["commit"] is None
    assert begun.header["code"]["reason"] == f"{tmp_path} is in no git repository"
    assert summary.code_of(begun) is None


def test_a_script_has_the_commit_of_its_own_repository(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(here, "The program", {"train.py": "print('trained')\n"})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--script", str(here / "train.py"), "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    assert membench.read_run(path).header["code"]["commit"] == git_head(here)


def test_tests_have_the_commit_of_their_repository(inner: pytest.Pytester) -> None:
    inner.makepyfile("def test_it(membench):\n    membench(list)\n")
    git(inner.path, "init", "--quiet")
    of = commit(inner.path, "The test", {".gitignore": "results\n"})
    inner.runpytest_subprocess("-q").assert_outcomes(passed=1)
    (path,) = (inner.path / "results").glob("*.jsonl")
    assert membench.read_run(path).header["code"]["commit"] == of


def _at(day: int, of: str | None, committed: int = 0, mib: int = 1, **code: Any) -> membench.Run:
    told = {"commit": of and of * 40, "is_changed": False, **code}
    if committed:
        told["committed_at"] = f"2026-10-{committed}T00:00:00+00:00"
    return run([record("none", peak_live_bytes=mib * MIB)], run=f"run-{day}", code=told, machine={"commit": "c0ffee"},
               started_at=f"2026-11-{day}T10:00:00+00:00")  # fmt: skip


def test_a_history_goes_by_commits_in_whatever_order_they_were_measured() -> None:
    runs = [_at(20, "b", 12, 3), _at(21, "a", 11, 5), _at(22, "b", 12, 2, is_changed=True)]
    ((live,),) = history.history(runs).values()
    assert live.runs == (
        "2026-11-21 10:00 UTC (aaaaaaaaaaaa)", "2026-11-20 10:00 UTC (bbbbbbbbbbbb)",
        "2026-11-22 10:00 UTC (bbbbbbbbbbbb-dirty)",
    )  # fmt: skip
    assert live.series[0].values == (5, 3, 2)
    assert live.caption.startswith("Live peak over 3 runs, in the order of their commits. The last against the first")
    # A run of no repository has no place among commits.
    ((live,),) = history.history([*runs, _at(19, None)]).values()
    assert [label.partition("(")[2] for label in live.runs] == [
        "no commit)", "bbbbbbbbbbbb)", "aaaaaaaaaaaa)", "bbbbbbbbbbbb-dirty)",
    ]  # fmt: skip


def test_reports_name_the_commit_of_the_code_beside_membenchs_own(tmp_path: Path) -> None:
    known, unknown = _at(20, "b", 12), _at(21, None, reason="nowhere is in no git repository")
    assert summary.overview(known).endswith("code at commit bbbbbbbbbbbb, membench at commit c0ffee.")
    assert summary.overview(unknown).endswith(" UTC on membench at commit c0ffee.")
    made = page.page([known, unknown])
    assert "<dt>code under test</dt><dd>bbbbbbbbbbbb</dd>" in made
    assert "<dt>code under test</dt><dd>nowhere is in no git repository</dd>" in made
    assert "<dt>membench&#39;s commit</dt><dd>c0ffee</dd>" in made
