"""Finding plug-ins, the broken ones among them, and listing what there is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from membench.cli import main
from membench.errors import PluginError, did_you_mean
from membench.plugins import registry
from tests.installing import install

_GOOD = """\
from typing import ClassVar, Literal
from pydantic import Field
from membench.plugins import Technique
class Halved(Technique):
    \"\"\"Halves \u001b whatever there is.

    half(x) = x / 2, after nobody.
    \"\"\"
    acts_on: ClassVar[str] = "weights, cache"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    needs: ClassVar[dict[str, str]] = {"json": "json", "not_there": "halving[all]"}
    presets: ClassVar[dict[str, dict[str, object]]] = {"deep": {"depth": 8}, "flat": {"depth": 1}}
    depth: int = Field(2, ge=1, le=9)
    \"\"\"How often it
    is halved.\"\"\"
    share: float | None = Field(None, gt=0, lt=1)
    storage: Literal["dense", "csr"] = "dense"
    only: tuple[str, ...] = ()
    name: str
    quick: bool = False
    layers: int | Literal["all"] = "all"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, to install plug-ins to."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def _listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["list", *arguments]) == 0
    return capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["list", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1
    return errors.removeprefix("membench: ").removesuffix("\n")


def test_a_broken_plug_in_is_reported_and_breaks_nothing_else(site: Path) -> None:
    # In a process of its own, where torch has not been imported yet; a stand-in for it is quicker than itself.
    install(
        site,
        "breakage",
        "[membench.techniques]\n"
        "absent = breakage_absent:Nothing\n"
        "empty = breakage_heavy:Nothing\n"
        "heavy = breakage_heavy:Heavy\n"
        "heavy-too = breakage_heavy:HeavyToo\n"
        "leaves = breakage_leaves:Nothing\n"
        "stranger = json:JSONDecoder\n",
        {
            "torch.py": "",
            "breakage_heavy.py": "import torch\nfrom membench.plugins import Technique\n"
            "class Heavy(Technique): ...\nclass HeavyToo(Technique): ...\n",
            "breakage_leaves.py": "raise SystemExit('first line\\nsecond line')\n",
        },
    )
    ran = subprocess.run(
        [sys.executable, "-m", "membench", "list"],
        env=os.environ | {"PYTHONPATH": f"{site}:{os.environ['PYTHONPATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    of = "of breakage 1.0"
    broken = {
        "absent": f"{of} (breakage_absent:Nothing) cannot be loaded: "
        "ModuleNotFoundError: No module named 'breakage_absent'",
        "empty": f"{of} (breakage_heavy:Nothing) cannot be loaded: "
        "AttributeError: module 'breakage_heavy' has no attribute 'Nothing'",
        "heavy": f"{of} (breakage_heavy:Heavy) imports torch when it is loaded; it must do so in its methods",
        "heavy-too": f"{of} (breakage_heavy:HeavyToo) imports torch when it is loaded; it must do so in its methods",
        "leaves": f"{of} (breakage_leaves:Nothing) cannot be loaded: SystemExit: first line",
        "stranger": f"{of} (json:JSONDecoder) is no subclass of membench.plugins.Technique",
    }
    lines = ran.stdout.splitlines()
    for name, error in broken.items():
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.split(maxsplit=1)[1] == f"broken: technique '{name}' {error}"
    assert any(line.startswith("  bf16 ") and "broken" not in line for line in lines)


def test_a_broken_plug_in_that_is_asked_for_is_an_error(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "breakage", "[membench.models]\nabsent = breakage_absent:Nothing\n", {})
    said = (
        "model 'absent' of breakage 1.0 (breakage_absent:Nothing) cannot be loaded: "
        "ModuleNotFoundError: No module named 'breakage_absent'"
    )
    assert _refused(capsys, "absent") == said
    with pytest.raises(PluginError) as caught:
        registry.create("model", "absent-small", {})
    assert str(caught.value) == said


def test_a_broken_plug_in_does_not_stand_before_the_preset_of_another(site: Path) -> None:
    entry_points = "[membench.techniques]\nhalved = halves_absent:Halved\nhalved-more = halves_more:Halved\n"
    install(site, "halving", entry_points, {"halves_more.py": _GOOD})
    assert registry.create("technique", "halved-more-deep", {"name": "x"}).depth == 8
    with pytest.raises(PluginError, match=r"technique 'halved' of halving 1.0 .* cannot be loaded"):
        registry.find("technique", "halved-deep")


def test_what_a_plug_in_prints_when_it_is_loaded_is_not_taken_for_a_table(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry_points = "[membench.techniques]\nloud = loud_halves:Halved\n[membench.suites]\nloud = loud_suites:PATH\n"
    modules = {"loud_halves.py": f"print('loud')\n{_GOOD}", "loud_suites.py": "print('loud')\nPATH = 'gone.toml'\n"}
    install(site, "loudness", entry_points, modules)
    assert main(["list"]) == 0
    output, errors = capsys.readouterr()
    assert "loud\n" not in output
    assert errors == "loud\nloud\n"


def test_two_plug_ins_of_one_name_are_an_error_that_names_both(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "other", "[membench.models]\nllama = others:Llama\nllama-15m = others:Llama\n", {})
    mine = f"membench {version('membench')} (membench.builtin.models.transformer:Llama)"
    said = {
        f"2 plug-ins are named model 'llama': of other 1.0 (others:Llama) and {mine};"
        " write 'other:llama' or 'membench:llama'",
        f"2 plug-ins are named model 'llama': of {mine} and other 1.0 (others:Llama);"
        " write 'membench:llama' or 'other:llama'",
    }
    assert _refused(capsys, "llama") in said
    (line,) = (line for line in _listed(capsys, "models").splitlines() if line.startswith("  llama "))
    assert line.split("ambiguous: ")[1] in said
    assert registry.create("model", "gpt2", {}).size == "124m"


def test_a_plug_in_named_as_another_s_preset_is_an_error_that_names_both(site: Path) -> None:
    entry_points = "[membench.techniques]\nhalved = halves_first:Halved\n"
    install(site, "first", entry_points, {"halves_first.py": _GOOD})
    install(site, "second", entry_points.replace("halved =", "halved-deep ="), {})
    with pytest.raises(PluginError) as caught:
        registry.find("technique", "halved-deep")
    assert str(caught.value) == (
        "2 plug-ins are named technique 'halved-deep': of second 1.0 (halves_first:Halved) "
        "and first 1.0 (halves_first:Halved); write 'second:halved-deep' or 'first:halved-deep'"
    )
    assert registry.find("technique", "halved-flat")[1] == {"depth": 1}


def test_listing_a_kind_says_what_techniques_act_on_and_where_they_run(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "good", "[membench.techniques]\nhalved = halves_listed:Halved\n", {"halves_listed.py": _GOOD})
    first, *lines = _listed(capsys, "techniques").splitlines()
    assert first == "techniques"
    assert all(line.startswith("  ") for line in lines)
    (line,) = (line for line in lines if line.startswith("  halved"))
    cells = [cell.strip() for cell in line.split("  ") if cell]
    assert cells == ["halved-{deep,flat}", "on weights, cache", "runs on cuda", r"Halves \x1b whatever there is."]


def test_presets_are_one_line_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _listed(capsys, "models").splitlines()
    assert [line.split()[0] for line in lines if "llama" in line] == ["llama-{15m,60m,1b,7b,13b,70b}"]


def test_suites_are_listed_with_their_descriptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suites").mkdir()
    Path("suites", "broken.toml").write_text("[suite")
    Path("suites", "own.toml").write_text('[suite]\nname = "own"\ndescription = "What is ours"\n')
    lines = _listed(capsys, "suites").splitlines()
    assert lines[0] == "suites"
    assert lines[2].split(maxsplit=2) == ["own", "./suites", "What is ours"]
    assert lines[1].split(maxsplit=2)[2].startswith(f"broken: {tmp_path}/suites/broken.toml: not valid TOML: ")
    mine = f"membench {version('membench')}"
    assert any(" ".join(line.split()).startswith(f"quickstart {mine} Half precision and int8") for line in lines[1:])


def test_everything_is_listed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    heads = [line for line in _listed(capsys).splitlines() if not line.startswith(" ")]
    assert heads == ["models", "techniques", "workloads", "metrics", "suites"]


def test_a_technique_s_options_are_listed_with_types_defaults_and_bounds(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "good", "[membench.techniques]\nhalved = halves_detailed:Halved\n", {"halves_detailed.py": _GOOD})
    assert _listed(capsys, "halved") == (
        "technique halved\n"
        "\n"
        "  Halves \\x1b whatever there is.\n"
        "\n"
        "  half(x) = x / 2, after nobody.\n"
        "\n"
        "  acts on  weights, cache\n"
        "  runs on  cuda\n"
        "  needs    json: installed\n"
        "  needs    not_there: pip install 'halving[all]'\n"
        "  options\n"
        "    depth    whole number, at least 1, at most 9  default 2        How often it is halved.\n"
        "    share    number, more than 0, less than 1     default none\n"
        "    storage  'dense' or 'csr'                     default 'dense'\n"
        "    only     list of text                         default []\n"
        "    name     text                                 must be given\n"
        "    quick    true or false                        default false\n"
        "    layers   whole number or 'all'                default 'all'\n"
    )
    assert "    depth    whole number, at least 1, at most 9  8, by its name" in _listed(capsys, "halved-deep")


def test_a_kind_comes_before_a_suite_and_a_suite_before_a_plug_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suites").mkdir()
    text = '[suite]\nname = "s"\n[matrix]\nmodel = ["ballast"]\ntechnique = ["none"]\nworkload = ["forward"]\n'
    for name in ("models", "forward"):
        Path("suites", f"{name}.toml").write_text(text)
    assert _listed(capsys, "models").startswith("models\n")
    assert _listed(capsys, "forward") == _listed(capsys, "suites/models.toml") == "ballast/none/forward/cpu\n"
    assert _listed(capsys, "train").startswith("workload train\n")


def test_a_name_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, "tehniques") == "nothing is named 'tehniques'; did you mean 'techniques'?"
    assert _refused(capsys, "bf-16") == "nothing is named 'bf-16'; did you mean 'bf16'?"
    assert _refused(capsys, "nowhere/x.toml") == "'nowhere/x.toml': there is no such file"
    assert _refused(capsys, "a\nb").startswith(r"nothing is named 'a\nb'; ")


def test_a_hint_names_the_nearest_else_all_of_few_else_the_nearest_ten_of_many() -> None:
    assert did_you_mean("BLOCK", ["block", "stone"]) == "did you mean 'block'?"
    assert did_you_mean("water", ["block", "rod"]) == "known: block, rod"
    assert did_you_mean("water", []) == "none is known"
    many = [f"{letter}{letter}" for letter in "bcdfghijklmnopqsuvxyz"] + ["wxxxx"]
    hint = did_you_mean("water", many)
    assert hint.startswith("known, among 22: ")
    assert "wxxxx" in hint
    assert hint.count(",") == 10


def test_options_are_taken_as_json_has_them(site: Path) -> None:
    install(site, "good", "[membench.techniques]\nhalved = halves_strict:Halved\n", {"halves_strict.py": _GOOD})

    def create(**options: object) -> str:
        try:
            made = registry.create("technique", "halved", {"name": "x"} | options)
        except PluginError as error:
            return str(error).removeprefix("technique 'halved': ")
        return repr({name: getattr(made, name) for name in options})

    assert create(only=["head"], depth=3, share=0.5) == "{'only': ('head',), 'depth': 3, 'share': 0.5}"
    assert create(only="head") == "option 'only' = 'head': expected a list"
    assert create(only=["head", 3]) == "option 'only.1' = 3: expected text"
    assert create(depth=2.0) == "option 'depth' = 2.0: expected a whole number"
    assert create(depth=10) == "option 'depth' = 10: must be at most 9"
    assert create(share=1) == "option 'share' = 1: must be less than 1"
    assert create(quick="true") == "option 'quick' = 'true': expected true or false"
    assert create(quick=1) == "option 'quick' = 1: expected true or false"
    assert create(name=True) == "option 'name' = true: expected text"
    assert create(storage="CSR") == "option 'storage' = 'CSR': did you mean 'csr'?"
    assert create(layers="most") == "option 'layers' = 'most': expected a whole number or 'all'"
    assert create(stroage="csr") == "unknown option 'stroage'; did you mean 'storage'?"


_SUITE_TEXT = """\
[suite]
name = "s"
description = "{description}"
[matrix]
model = ["ballast"]
technique = ["none"]
workload = ["burst"]
"""


def test_a_package_s_suites_are_run_and_listed_by_name(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entry_points = (
        "[membench.suites]\nbudget = suites_{0}:BUDGET\nshared = suites_{0}:BUDGET\nbroken-{0} = suites_{0}:GONE\n"
    )
    for package in ("first", "second"):
        module = f"from pathlib import Path\nBUDGET = Path(__file__).parent / '{package}.toml'\n"
        text = entry_points.format(package)
        if package == "second":
            text = text.replace("budget =", "other-budget =")
        install(site, package, text, {f"suites_{package}.py": module})
        (site / f"{package}.toml").write_text(_SUITE_TEXT.format(description=f"Of the {package}"))
    assert _listed(capsys, "budget") == _listed(capsys, "second:shared") == "ballast/none/burst/cpu\n"
    assert main(["run", "other-budget", "--dry-run"]) == 0
    said = _refused(capsys, "shared")
    assert said in {
        f"2 suites are named 'shared': of {a} 1.0 (suites_{a}:BUDGET) and {b} 1.0 (suites_{b}:BUDGET);"
        f" write '{a}:shared' or '{b}:shared'"
        for a, b in (("first", "second"), ("second", "first"))
    }
    cells = {line.split()[0]: line.split(maxsplit=1)[1] for line in _listed(capsys, "suites").splitlines()[1:]}
    assert " ".join(cells["budget"].split()) == "first 1.0 Of the first"
    assert cells["broken-first"].endswith(
        "broken: suite 'broken-first' of first 1.0 (suites_first:GONE) cannot be loaded: "
        "AttributeError: module 'suites_first' has no attribute 'GONE'"
    )
    assert f"broken: {said}" in cells["shared"]
    assert cells["quickstart"].startswith("membench ")
    # What lies here is nearer than what is installed.
    Path("suites").mkdir()
    Path("suites", "budget.toml").write_text(_SUITE_TEXT.format(description="Of this folder").replace("none", "bf16"))
    assert _listed(capsys, "budget") == "ballast/none/burst/cpu\nballast/bf16/burst/cpu\n"
    assert _listed(capsys, "first:budget") == "ballast/none/burst/cpu\n"


def test_a_package_s_suite_may_be_in_python(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = "from pathlib import Path\nIN_PYTHON = Path(__file__).with_name('in_python.py')\n"
    install(site, "third", "[membench.suites]\nin-python = suites_third:IN_PYTHON\n", {"suites_third.py": paths})
    (site / "in_python.py").write_text(
        "import membench\nsuite = membench.Suite('in-python', description='Made', matrix={'model': ['ballast'],"
        " 'technique': ['none'], 'workload': ['burst']})\n"
    )
    assert _listed(capsys, "in-python") == _listed(capsys, "third:in-python") == "ballast/none/burst/cpu\n"
    (line,) = (line for line in _listed(capsys, "suites").splitlines() if "in-python" in line)
    assert line.split() == ["in-python", "third", "1.0", "Made"]


def test_the_reference_is_membench_s_own(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "other", "[membench.techniques]\nnone = halves_of_none:Halved\n", {})
    lines = [line.split(maxsplit=1)[1] for line in _listed(capsys, "techniques").splitlines() if line[:7] == "  none "]
    assert lines[0] == (
        "broken: technique 'none' of other 1.0 (halves_of_none:Halved) is never used:"
        " every ratio is against membench's own"
    )
    assert registry.find("technique", "none").loaded.__name__ == "NoTechnique"
