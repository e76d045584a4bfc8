"""The README's way from nothing to a failing check, done step by step as GitHub does it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.repositories import MODEL, commit, git, repository

_README = (Path(__file__).parent.parent / "README.md").read_text()
_SET_UP = next(iter(re.findall(r"```sh\n(cat > memory\.toml.*?)```", _README, re.DOTALL)), "")
_GITLAB = next(iter(re.findall(r"```yaml\n(memory:.*?)```", _README, re.DOTALL)), "")


def _shell(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub's runner does: 'bash -e' over a file of its lines."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    program = programs / "membench"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m membench "$@"\n')
    program.chmod(0o755)
    step = folder.parent / "step.sh"
    step.write_text(script)
    named = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
             for what, value in (("NAME", "Someone"), ("EMAIL", "someone@example.org"))}  # fmt: skip
    environment = {**os.environ, **named, **variables, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", str(step)], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a model, set up as the README says."""
    folder = repository(tmp_path / "project")
    done = _shell(folder, _SET_UP)
    assert done.returncode == 0, done.stderr
    return folder


def _steps(project: Path) -> list[dict[str, object]]:
    (job,) = yaml.safe_load((project / ".github/workflows/memory.yml").read_text())["jobs"].values()
    steps: list[dict[str, object]] = job["steps"]
    return steps


def test_a_pull_request_that_grows_the_model_fails(project: Path, tmp_path: Path) -> None:
    git(project, "checkout", "--quiet", "-b", "feature")
    commit(project, "Grow", {"model.py": MODEL.format(width=512)})
    git(project, "checkout", "--quiet", "main")
    git(project, "merge", "--quiet", "--no-ff", "feature", "--message", "Merge")  # what GitHub checks out
    depth = next(step["with"]["fetch-depth"] for step in _steps(project) if "fetch-depth" in step.get("with", {}))  # type: ignore[index, operator]
    git(tmp_path, "clone", "--quiet", "--depth", str(depth), f"file://{project}", "checkout")
    run = [str(step["run"]) for step in _steps(project) if "run" in step and "pip install" not in str(step["run"])]
    (script,) = run
    summary = tmp_path / "summary.md"
    done = _shell(
        tmp_path / "checkout",
        script.replace("--against-ref", "--repeats 1 --against-ref"),  # one round is enough to see it
        GITHUB_ACTIONS="true",
        GITHUB_STEP_SUMMARY=str(summary),
    )
    assert done.returncode == 1, done.stderr
    grown = "weights 513.0 KiB → 1.001 MiB (+99.8%"
    assert f"regressed: own/none/forward/cpu: {grown}" in done.stdout
    assert f"::error title=membench%3A own/none/forward/cpu::{grown}25" in done.stderr
    assert f"- own/none/forward/cpu: {grown}" in summary.read_text()
    assert 'failures="1"' in (tmp_path / "checkout" / "memory.xml").read_text()


def test_the_pull_request_that_adds_the_suite_passes(project: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth", "2", f"file://{project}", "checkout")
    (script,) = [str(step["run"]) for step in _steps(project) if "membench run" in str(step.get("run"))]
    done = _shell(tmp_path / "checkout", script, GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
    assert done.returncode == 0, done.stderr
    assert "suite memory.toml is not in 'HEAD^1' (" in done.stdout
    assert (tmp_path / "summary.md").read_text().startswith("## ✅ membench run memory: 1 passed\n")


def test_every_step_is_an_install_an_action_or_run_by_the_test_above(project: Path) -> None:
    shell = [str(step["run"]) for step in _steps(project) if "run" in step]
    assert [line.split()[:2] for line in shell] == [["pip", "install"], ["membench", "run"]]
    assert all("run" in step or str(step["uses"]).startswith("actions/") for step in _steps(project))


def test_gitlabs_script_is_the_same_command(project: Path) -> None:
    job = yaml.safe_load(_GITLAB)["memory"]
    install, script = job["script"]
    assert install.startswith("pip install ")
    (of_github,) = [str(step["run"]) for step in _steps(project) if "membench run" in str(step.get("run"))]
    assert script.split()[:4] == of_github.split()[:4]
    assert job["artifacts"]["reports"]["junit"] == script.split()[-1]
    assert job["variables"]["GIT_DEPTH"] == 0
