"""``python -m membench`` in a checkout that is not installed, or without dependencies, says what to do in one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_SITE = Path(sysconfig.get_paths()["purelib"])
_REMEDY = f"run {shlex.join([sys.executable, '-m', 'pip', 'install', '-e', str(_ROOT)])}\n"


def _run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout with these packages and no others: -S leaves out what is installed."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "membench", *words],
        cwd=_ROOT, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def _linked(folder: Path, *, metadata: bool, dependencies: bool) -> Path:
    for path in _SITE.iterdir():
        is_metadata = path.name.startswith("membench-")
        if (metadata if is_metadata else dependencies) and path.name != "membench":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("words", [(), ("list",), ("show",), ("--version",)], ids=" ".join)
@pytest.mark.parametrize("dependencies", [False, True], ids=["nothing installed", "dependencies alone installed"])
def test_without_metadata_it_says_how_to_install(tmp_path: Path, dependencies: bool, words: tuple[str, ...]) -> None:
    ran = _run(_linked(tmp_path, metadata=False, dependencies=dependencies), *words)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"membench: not installed in {sys.executable}: {_REMEDY}"


def test_without_its_dependencies_it_names_one(tmp_path: Path) -> None:
    ran = _run(_linked(tmp_path, metadata=True, dependencies=False), "list")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"membench: its dependency 'pydantic' is missing in {sys.executable}: {_REMEDY}"


def test_with_both_it_runs(tmp_path: Path) -> None:
    ran = _run(_linked(tmp_path, metadata=True, dependencies=True), "list", "workloads")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "forward" in ran.stdout
