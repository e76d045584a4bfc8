"""Two commits of a user's repository, measured in turn, each with its own code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import membench
from membench import cli
from membench.cli import against
from membench.comparing import against_commit
from membench.comparing.against_commit import Interleaved
from membench.comparing.git import GitError, Repository
from membench.errors import MembenchError
from membench.host import procfs
from membench.suite.tolerances import Tolerances, parse_fail
from tests.repositories import MODEL, SUITE, commit, git, repository

_WIDTH, _WIDER = 256, 512
_CASE = "own/none/forward/cpu"


def _weights_bytes(width: int) -> int:
    return 4 * (256 * width + 256 * width + 256)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the test's own for what is temporary; nothing of ours is left in it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    assert list(folder.glob("membench-*")) == []


@pytest.fixture
def here(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository that is the current folder; git knows of no other work tree in the end."""
    folder = repository(tmp_path / "repository", _WIDTH)
    monkeypatch.chdir(folder)
    yield folder
    assert git(folder, "worktree", "list").count("\n") == 0


def _suite() -> membench.Suite:
    return membench.load_suite("small.toml")


def test_each_side_runs_its_own_code_and_they_take_turns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As an editable install leaves it: the checkout's own folder stands on Python's path.
    suite = SUITE.replace("model:make", "own.layers:make")
    first = commit(here, "Package", {"src/own/layers.py": MODEL.format(width=_WIDTH), "small.toml": suite})
    second = commit(here, "Grow", {"src/own/layers.py": MODEL.format(width=1)})
    (here / "src/own/layers.py").write_text(MODEL.format(width=_WIDER))
    monkeypatch.syspath_prepend(str(here / "src"))
    monkeypatch.setenv("PYTHONPATH", f"{here / 'src'}{os.pathsep}{os.environ['PYTHONPATH']}")
    heard: list[str] = []

    def tell(event: str, details: Any) -> None:
        if event in ("case", "record"):
            heard.append(f"{event} {details['id'].partition(' ')[0]}")

    with Interleaved(_suite().with_repeats(2), "HEAD~1", tell=tell) as both:
        assert both.is_changed
        base, head = both.measure(2)
    order = ["base", "head", "head", "base"]
    assert heard == [f"{event} {side}" for side in order for event in ("case", "record")]
    # What is here is measured as it is, with changes that are not committed; the header says so.
    for run, width, of, is_changed in ((base, _WIDTH, first, False), (head, _WIDER, second, True)):
        assert [(record.id, record.repeat, record.status) for record in run.records] == [
            (_CASE, 0, "ok"), (_CASE, 1, "ok"),
        ]  # fmt: skip
        assert {record.metrics["weights_bytes"] for record in run.records} == {_weights_bytes(width)}
        assert (run.header["code"]["commit"], run.header["code"]["is_changed"]) == (of, is_changed)
    # What is looked for in results by its time is what was measured of the code that is here.
    assert membench.newest_run("results").resolve() == head.path
    assert base.path.parent == head.path.parent / "base"


def test_code_that_would_come_out_of_the_checkout_for_both_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An editable install put the checkout's folder on Python's path, and the other commit has no such module.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys; sys.path.append({str(here / 'lib')!r})")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.syspath_prepend(str(here / "lib"))
    commit(here, "Suite", {"small.toml": SUITE.replace("model:make", "layers:make")})
    (here / "lib").mkdir()
    git(here, "mv", "model.py", "lib/layers.py")
    with pytest.raises(MembenchError) as raised, Interleaved(_suite(), "HEAD"):
        pass
    assert str(raised.value).startswith(
        f"base: 'layers:make' of model 'factory' would come out of {here} and not out of the other commit"
    )


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Installs a project as setuptools does for editing, by a finder of its own; what is to go on PYTHONPATH."""
    pytest.importorskip("setuptools", minversion="70.1")

    def install(project: Path) -> str:
        site, wheels = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("wheels")
        build = f"from setuptools import build_meta; build_meta.build_editable({str(wheels)!r})"
        subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=project, check=True, capture_output=True)
        (wheel,) = wheels.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(site)
        assert list(site.glob("__editable___*_finder.py"))
        (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
        return str(site)

    return install


_PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "own"
version = "1.0"
[tool.setuptools]
packages = ["own_layers", "own_space.sizes"]
[tool.setuptools.package-dir]
own_layers = "lib/layers"
"own_space.sizes" = "lib/sizes"
"""


@pytest.mark.parametrize("imported", ["own_layers", "own_space.sizes"])
def test_what_a_model_imports_through_an_editable_installs_finder_is_refused_not_measured(
    here: Path, editable: Callable[[Path], str], imported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"from {imported} import WIDTH\n" + MODEL.replace("{width}", "WIDTH")
    files = {f"lib/{name}/__init__.py": "WIDTH = 256\n" for name in ("layers", "sizes")}
    files |= {"pyproject.toml": _PROJECT, "model.py": model, ".gitignore": "results\n*.egg-info\nbuild\n"}
    commit(here, "Install it", files)
    monkeypatch.setenv("PYTHONPATH", f"{editable(here)}{os.pathsep}{os.environ['PYTHONPATH']}")
    done = _membench("run", "small.toml", "--against-ref", "HEAD", "--repeats", "1")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"membench: base: module '{imported}' would come out of {here} and not out of the other commit:"
        " put the folder that it is imported from on PYTHONPATH",
    ), done.stdout + done.stderr


def test_a_suite_that_the_commit_does_not_have_is_named(here: Path) -> None:
    (here / "suites").mkdir()
    (here / "suites" / "new.toml").write_text(SUITE.replace('"small"', '"new"'))
    with pytest.raises(MembenchError) as raised, Interleaved(membench.load_suite("new"), "HEAD"):
        pass
    commit_id = git(here, "rev-parse", "HEAD")[:12]
    assert str(raised.value) == (
        f"suite {here}/suites/new.toml is not in 'HEAD' ({commit_id}): there is nothing to compare with"
    )


def test_only_work_trees_of_ours_are_forgotten(here: Path, tmp_path: Path, temporary: Path) -> None:
    """What a killed run left is; somebody's that lies on a disk which is not there just now is none of our business."""
    theirs, ours = tmp_path / "on-a-disk", temporary / "membench-1-killed" / "tree"
    for path in (theirs, ours):
        git(here, "worktree", "add", "--quiet", "--detach", str(path), "HEAD")
        shutil.rmtree(path)
    shutil.rmtree(ours.parent)
    with Repository(here).work_tree("HEAD"):
        known = git(here, "worktree", "list")
        assert str(theirs) in known
        assert str(ours) not in known
    assert str(theirs) in git(here, "worktree", "list")
    git(here, "worktree", "remove", "--force", str(theirs))


def test_a_suite_that_is_broken_in_the_commit_is_told_of_the_base(here: Path) -> None:
    commit(here, "Break it", {"small.toml": SUITE.replace("[settings]", "[settigns]")})
    (here / "small.toml").write_text(SUITE)
    what = r"^base: .*small\.toml: unknown key 'settigns'; did you mean 'settings'"
    with pytest.raises(MembenchError, match=what), Interleaved(_suite(), "HEAD"):
        pass


def test_a_ref_that_nobody_knows_is_named(here: Path) -> None:
    for ref in ("no-such-branch", "--output=x", "HEAD:model.py"):
        with pytest.raises(GitError) as raised:
            Interleaved(_suite(), ref)
        assert str(raised.value) == f"'{ref}' names no commit here"


def test_a_shallow_clone_says_how_to_get_what_is_missing(here: Path, tmp_path: Path) -> None:
    commit(here, "Grow", {"model.py": MODEL.format(width=_WIDER)})
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{here}", "shallow")
    with pytest.raises(GitError) as raised:
        Repository(tmp_path / "shallow").commit("HEAD~1")
    assert str(raised.value).startswith("'HEAD~1' names no commit here; this clone is shallow: fetch it")
    assert "fetch-depth: 0" in str(raised.value)


def test_a_folder_outside_every_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(GitError) as raised:
        Repository(tmp_path)
    assert str(raised.value) == f"{tmp_path} is in no git repository: there is no other commit to compare with"


def test_a_side_that_is_killed_is_told_of_and_leaves_nothing_behind(here: Path) -> None:
    with Interleaved(_suite(), "HEAD") as both:
        os.kill(both._base._process.pid, signal.SIGKILL)
        with pytest.raises(MembenchError, match=r"^base: its process in .* ended unexpectedly: without a word$"):
            both.measure(1)


def test_a_side_that_does_not_answer_is_told_of_and_killed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_commit, "_SILENCE_S", 8 - _suite().settings.timeout_s)
    with Interleaved(_suite(), "HEAD") as both:
        pid = both._base._process.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(MembenchError, match=r"^base: its process in .* did not answer within 8 s$"):
            both.measure(1)
    assert procfs.running(pid) is None


def test_an_interrupt_in_the_middle_of_a_case_removes_the_work_tree(here: Path) -> None:
    command = [sys.executable, "-m", "membench", "run", "small.toml", "--against-ref", "HEAD", "--repeats", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(path.read_bytes().count(b"\n") > 1 for path in (here / "results").glob("base/*.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert git(here, "worktree", "list").count("\n") == 1
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said


def _membench(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "membench", *arguments], env={**os.environ, **variables},
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def test_a_model_that_grew_since_the_commit_fails_and_is_told_where(here: Path) -> None:
    commit(here, "Grow", {"model.py": MODEL.format(width=_WIDER)})
    done = _membench("run", "small.toml", "--against-ref", "HEAD~1", "--repeats", "1", "--fail", "time:off",
                     "--junit", "junit.xml", GITHUB_ACTIONS="true")  # fmt: skip
    assert done.returncode == 1, done.stderr
    grown = f"{_CASE}: weights 513.0 KiB → 1.001 MiB (+99.8%, tolerance 1%): +512.0 KiB weights of"
    assert f"regressed: {grown}" in done.stdout
    assert "::error title=membench%3A own/none/forward/cpu::weights 513.0 KiB → 1.001 MiB (+99.8%25" in done.stderr
    assert 'failures="1"' in (here / "junit.xml").read_text()
    # A suspect was measured again on both sides before that was said.
    for path in (membench.newest_run("results"), membench.newest_run("results/base")):
        assert [record.repeat for record in membench.read_run(path).records] == [0, 1, 2, 3]


def test_a_suite_that_is_new_is_measured_alone_by_its_limits_and_gates(here: Path) -> None:
    new = SUITE.replace('"small"', '"new"')
    (here / "new.toml").write_text(new)
    asked = ["run", "new.toml", "--against-ref", "HEAD", "--repeats", "1", "--summary", "summary.md"]
    passes = _membench(*asked)
    assert passes.returncode == 0, passes.stderr
    said = (
        f"suite new.toml is not in 'HEAD' ({git(here, 'rev-parse', 'HEAD')[:12]}): there is nothing to compare with;"
        " what is here is measured alone"
    )
    assert said in passes.stdout
    assert "own · forward · cpu" in passes.stdout
    assert "there is nothing to compare with" in Path("summary.md").read_text()
    assert [path.parent.name for path in here.rglob("*.jsonl")] == ["results"]
    (here / "new.toml").write_text(new + '[limits]\nweights = "1 KiB"\n')
    fails = _membench(*asked)
    assert fails.returncode == 1
    assert said in fails.stdout


def test_what_has_not_changed_passes(here: Path) -> None:
    done = _membench("run", "small.toml", "--against-ref", "HEAD", "--repeats", "1", "--fail", "time:off")
    assert (done.returncode, "nothing regressed" in done.stdout) == (0, True), done.stdout + done.stderr
    # Nothing watches quality, so no time is spent on it.
    assert "quality was not judged: no tolerance, limit or gate watches it" in done.stdout
    for path in (membench.newest_run("results"), membench.newest_run("results/base")):
        (record,) = membench.read_run(path).records
        assert record.reasons["kl_nats"] == "quality was not judged: evaluate_s = 0"
        assert record.processes[0].phase("evaluate") is None


@pytest.mark.parametrize(
    ("more", "asked", "watches"),
    [
        ("", [], False),
        ("", ["peak_live:off"], False),
        ("", ["kl:0.01"], True),
        ("", ["kl:off"], False),
        ('[regression]\nbits_per_byte = "1%"\n', [], True),
        ("[limits]\ntop1_agreement = 90\n", [], True),
        ('[gate]\nrules = ["kl <= 0.01"]\n', [], True),
        ('[gate]\nrules = ["weights <= 1 GiB"]\n', [], False),
    ],
)
def test_quality_is_judged_where_something_watches_it(more: str, asked: list[str], watches: bool, here: Path) -> None:
    (here / "small.toml").write_text(SUITE + more)
    suite = _suite()
    tolerances = Tolerances(suite.tolerances, [parse_fail(text) for text in asked])
    assert against.watches_quality(suite, tolerances) is watches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against-ref", "nowhere"], "'nowhere' names no commit here"),
        (["--against-ref", "HEAD", "--resume"], "--resume goes on with one run; --against-ref measures two in turn"),
        (["quickstart", "--against-ref", "HEAD"], "--against-ref compares one suite; name one"),
        (["--against-ref", "HEAD", "--fail", "peak_lve:2%"], "'peak_lve'; did you mean 'peak_live'?"),
        (["--repeats", "3"], "--repeats belongs to --against-ref GIT_REF"),
        (["--fail", "time:off"], "--fail belongs to --against-ref GIT_REF"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line_and_measures_nothing(
    here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "small.toml", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (here / "results").exists()
