"""What the README says, held against the program."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import membench
from membench.records.metrics import METRICS
from membench.report import savings, text

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_KEPT = sorted((_ROOT / "results").glob("*@*.jsonl"))


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", _README, re.DOTALL))
def test_every_suite_in_it_can_be_read(block: str, suite_file: Path) -> None:
    # A block that shows some tables alone goes below a suite.
    head = '[suite]\nname = "s"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["bf16"]\nworkload = ["train"]\n'
    suite_file.write_text(block if "[suite]" in block else head + block)
    (own,) = (text for text in re.findall(r"```python\n(.*?)```", _README, re.DOTALL) if "membench.plugins" in text)
    (suite_file.parent / "membench_plugins.py").write_text(own)
    assert membench.load_suite(suite_file).cases


def _text_with(kept: Path) -> str:
    """Where a kept run's table stands: the quickstart's in the README, all others beside the runs."""
    return _README if kept.name.startswith("quickstart@") else (_ROOT / "results" / "README.md").read_text()


@pytest.mark.parametrize("kept", _KEPT, ids=lambda path: path.name)
def test_tables_and_what_is_said_below_them_are_those_of_the_kept_runs(kept: Path) -> None:
    records, written = membench.read_run(kept).records, _text_with(kept)
    assert text.comparison(records, "github") in written
    assert "\n".join([*text.remarks(records), *savings.verdicts(records)]) in written


@pytest.mark.parametrize("kept", _KEPT, ids=lambda path: path.name)
def test_a_kept_run_is_one_of_the_suite_as_it_is(kept: Path) -> None:
    suite = membench.load_suite(kept.name.partition("@")[0])
    assert [record.id for record in membench.read_run(kept).records] == [case.id for case in suite.cases]


def test_the_advice_in_it_is_what_the_kept_run_leads_to() -> None:
    (call, block) = re.findall(r"```sh\nmembench (advise .*?)\n```.*?```text\n(.*?)```", _README, re.DOTALL)[0]
    said = subprocess.run(
        [sys.executable, "-m", "membench", *call.split()], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert block in said.stdout


@pytest.mark.parametrize("kept", _KEPT, ids=lambda path: path.name)
def test_it_shows_the_report_of_every_kept_run(kept: Path) -> None:
    picture = f"results/pictures/{kept.name.partition('@')[0]}.png"
    assert f"]({picture})" in _README
    assert (_ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_it_explains_every_column_of_the_table() -> None:
    titles = {metric.title for metric in METRICS if metric.in_table} | {"Pareto", "together"}
    explained = {
        name for row in re.findall(r"^\| ([^|]+) \| [^|]+ \|$", _README, re.MULTILINE) for name in row.split(", ")
    }
    assert titles <= explained


def test_every_technique_stands_in_it() -> None:
    named = set(re.findall(r"`([\w-]+?)(?:\+…)?`", _README))
    registered = {entry.name for entry in entry_points(group="membench.techniques") if "membench." in entry.value}
    assert registered - named <= {"accumulate"}  # written with its k


def test_every_example_of_python_compiles() -> None:
    for block in re.findall(r"```python\n(.*?)```", _README, re.DOTALL):
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("page", ["README.md", "membench/docs/architecture.md"])
def test_it_names_every_folder_of_the_package(page: str) -> None:
    rooms = {path.parent.name for path in (_ROOT / "membench").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"\b([a-z_]+)/", (_ROOT / page).read_text()))


@pytest.mark.parametrize("page", ["README.md", "membench/docs/architecture.md", ".github/CONTRIBUTING.md"])
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (_ROOT / page).read_text())
    assert [link for link in links if not ((_ROOT / page).parent / link).exists()] == []
