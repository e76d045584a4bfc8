"""The wheel in a fresh environment, away from the checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.fresh_environment import FreshEnvironment


def test_the_wheel_has_pages_templates_and_the_tutorial(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"membench/report/page.{ending}" for ending in ("html", "css", "js")} <= names
    assert {"membench/docs/plugins.md", "membench/testing/templates/any/pyproject.toml.txt"} <= names


def test_the_wheel_runs_a_suite_by_name_outside_the_checkout(fresh: FreshEnvironment, tmp_path: Path) -> None:
    ran = fresh.run(
        "python -c 'import membench; print(membench.__file__)'\n"
        "membench run quickstart -k llama-60m/none/forward --format csv",
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    where, header, first, *_ = ran.stdout.splitlines()
    assert "wheel-of-membench" in where
    values = dict(zip(header.split(","), first.split(","), strict=True))
    assert (values["status"], values["weights_bytes"][:3]) == ("ok", "232")
