"""Plug-ins in a file beside a suite: found, named, measured, and told of when they are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import membench
from membench.cli import main
from membench.comparing.against_commit import Interleaved
from membench.errors import MembenchError, ResultsError
from membench.regression.judging import judge
from membench.regression.measured import of_run
from membench.suite.tolerances import Tolerances
from tests.installing import install
from tests.repositories import commit, repository

pytest_plugins = ["pytester"]

_MIB = 2**20

_SUITE = """\
[suite]
name = "own"
{head}
[matrix]
model = ["small"]
technique = {techniques}
workload = ["still"]
[model.small]
use = "ballast"
mib = 8
[workload.still]
use = "burst"
mib = 0
[settings]
threads = 1
measured_steps = 1
"""

_HALVED = """\
from typing import ClassVar
from membench.plugins import LayerWise, Technique


class KeepsAPart(Technique):
    \"\"\"Leaves of each tensor only its beginning.\"\"\"

    acts_on = "weights"
    share: float = {share}

    def apply(self, module, context):
        import torch

        module.weight = torch.nn.Parameter(module.weight[: int(len(module.weight) * self.share)].clone(), False)
        return module


class Quarter(KeepsAPart):
    name: ClassVar[str] = "a-quarter"
    share: float = 0.25


class _Hidden(Technique):
    ...
"""


def _suite(folder: Path, techniques: list[str], head: str = "") -> Path:
    path = folder / "own.toml"
    path.write_text(_SUITE.format(head=head, techniques=techniques))
    return path


def _weights_mib(run: membench.Run) -> dict[str, float]:
    assert {record.status for record in run.records} <= {"ok"}
    return {record.technique: (record.metrics["weights_bytes"] or 0) / _MIB for record in run.records}


def _messages(run: membench.Run) -> dict[str, str | None]:
    """Of each technique but the reference."""
    return {record.technique: record.message for record in run.records[1:]}


def _refused(path: Path) -> str:
    with pytest.raises(MembenchError) as raised:
        membench.load_suite(path)
    return str(raised.value)


@pytest.mark.parametrize("isolation", ["fork", "spawn"])
def test_a_file_beside_the_suite_is_used_without_a_word_in_the_measured_process(
    tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.5))
    path = _suite(tmp_path, ["keeps-a-part"])
    path.write_text(f'{path.read_text()}isolation = "{isolation}"\n')
    suite = membench.load_suite(path)
    monkeypatch.chdir(tmp_path.parent)  # where the file is does not hang on the folder that the run goes on in
    assert _weights_mib(membench.run(suite, output=tmp_path / "results")) == {"none": 8, "keeps-a-part": 4}


def test_a_file_that_the_suite_names_is_used_with_variants_and_stacks(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.py").write_text(_HALVED.format(share=0.5))
    path = _suite(tmp_path, ["mine:a-quarter", "eighth", "keeps-a-part+mine:a-quarter"], 'plugins = ["parts/mine.py"]')
    path.write_text(f'{path.read_text()}[technique.eighth]\nuse = "mine:keeps-a-part"\nshare = 0.125\n')
    run = membench.run(membench.load_suite(path), output=tmp_path / "results")
    assert _weights_mib(run) == {
        "none": 8, "mine:a-quarter": 2, "eighth": 1, "keeps-a-part": 4, "keeps-a-part+mine:a-quarter": 1,
    }  # fmt: skip
    assert list(run.header["plugin_files"]) == ["parts/mine.py"]
    assert run.records[-1].case["technique_plugins"][0]["file"] == "parts/mine.py"


def test_a_class_is_named_by_itself_or_in_kebab_case_and_one_with_an_underscore_is_none(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        _HALVED.format(share=0.5) + "class FP8KVCache(Technique): ...\nclass Int8Twice(Technique): ...\n"
    )
    known = "known, among "
    said = _refused(_suite(tmp_path, ["xxxxxxxxxxxxxxxxxxxxxxxxx"]))
    assert known in said
    for name in ("keeps-a-part", "a-quarter", "fp8-kv-cache", "int8-twice"):
        assert membench.load_suite(_suite(tmp_path, [name])).cases[-1].technique == name
    for name in ("quarter", "hidden", "_hidden", "layer-wise", "technique"):
        assert f"no technique is named '{name}'" in _refused(_suite(tmp_path, [name]))


def test_one_named_as_an_installed_one_is_refused_with_how_to_choose(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.5).replace("a-quarter", "bf16"))
    said = _refused(_suite(tmp_path, ["bf16"]))
    assert said.startswith(
        f"{tmp_path}/own.toml: matrix.technique: 2 plug-ins are named technique 'bf16': "
        "of membench_plugins.py (class Quarter) and membench "
    )
    assert said.endswith("; write 'membench-plugins:bf16' or 'membench:bf16'")
    membench.load_suite(_suite(tmp_path, ["membench_plugins:bf16", "membench:bf16", "fp16"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport torch\n", "own.py, line 2: imports torch when it is loaded; do so in the methods"),
        ("try:\n    from torch import nn\nexcept ImportError: ...\n",
         "own.py, line 2: imports torch when it is loaded; do so in the methods"),
        ("x = 1\n\ny = z\n", "own.py, line 3: NameError: name 'z' is not defined"),
        ("x = 1\nclass (\n", "own.py, line 2: invalid syntax"),
        ("import json\n\njson.loads('{')\n", "own.py, line 3: JSONDecodeError: "),
        ("raise SystemExit('over')\n", "own.py, line 1: SystemExit: over"),
        ("from membench.plugins import Technique\nclass A(Technique):\n    depth = 2\n",
         "own.py, line 2: option 'depth' has no type: write 'depth: TYPE = 2', or ClassVar[TYPE] if it is no option"),
        ("from typing import ClassVar\nfrom membench.plugins import Technique\nclass A(Technique):\n"
         "    name: ClassVar = 'a b'\n",
         "own.py, line 3: class A is named 'a b': a name has letters, digits, '.', '_' and '-' and nothing else"),
        ("\0", "own.py: source code string cannot contain null bytes"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_run_is_one_line_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.py").write_text(text)
    assert _refused(_suite(tmp_path, ["bf16"], 'plugins = ["own.py"]')).startswith(
        f"{tmp_path}/own.toml: plug-in file {said}"
    )


def test_a_stage_that_exits_or_returns_nothing_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        "from membench.plugins import LayerWise, Technique\n"
        "class Whole(Technique):\n    def apply(self, module, context): ...\n"
        "class Layers(LayerWise):\n    def convert(self, name, layer, head): ...\n"
        "class Exits(Technique):\n    def apply(self, module, context): raise SystemExit(3)\n"
    )
    suite = membench.load_suite(_suite(tmp_path, ["whole", "layers", "exits"]))
    run = membench.run(suite, output=tmp_path / "results")
    assert {(record.status, record.ended_in) for record in run.records[1:]} == {("failed", "apply")}
    assert _messages(run) == {
        "exits": "SystemExit: 3",
        "whole": "TypeError: 'apply' of Whole returned nothing; end it with 'return module'",
        "layers": "TypeError: 'convert' of Layers returned nothing; end it with 'return layer'",
    }


def test_a_stage_of_training_that_returns_nothing_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        "from membench.plugins import Technique\n"
        "class Quicker(Technique):\n    def optimizer(self, optimizer, module, context): ...\n"
        "class Shorter(Technique):\n    def training_step(self, step, context): ...\n"
    )
    path = tmp_path / "own.toml"
    path.write_text(
        '[suite]\nname = "own"\n[matrix]\nmodel = ["untrained-tiny"]\ntechnique = ["quicker", "shorter"]\n'
        'workload = ["short"]\n[workload.short]\nuse = "train"\nbatch_size = 1\nsequence_length = 16\n'
    )
    run = membench.run(membench.load_suite(path), output=tmp_path / "results")
    assert _messages(run) == {
        "quicker": "TypeError: 'optimizer' of Quicker returned nothing; end it with 'return optimizer'",
        "shorter": "TypeError: 'training_step' of Shorter returned nothing; end it with 'return step'",
    }


def test_a_check_that_ends_in_an_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        "from membench.plugins import Model\nclass Odd(Model):\n"
        "    def check(self): raise KeyError('a')\n    def build(self, context): ...\n"
    )
    path = _suite(tmp_path, ["bf16"])
    path.write_text(path.read_text().replace('use = "ballast"\nmib = 8', 'use = "odd"'))
    assert _refused(path) == f"{path}: model.small: 'check' of model 'odd' ended in KeyError: 'a'"


def test_a_plug_in_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        "from membench.plugins import Technique\nclass Odd(Technique):\n"
        "    def model_post_init(self, context): raise KeyError('a')\n"
    )
    path = _suite(tmp_path, ["odd"])
    assert _refused(path) == f"{path}: matrix.technique: technique 'odd' cannot be made: KeyError: 'a'"


@pytest.mark.parametrize("text", ["", "from membench.plugins import Technique\nclass _Kept(Technique): ...\n"])
def test_a_file_without_a_plug_in_is_refused_where_it_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.py").write_text(text)
    said = _refused(_suite(tmp_path, ["bf16"], 'plugins = ["own.py"]'))
    assert said.startswith(f"{tmp_path}/own.toml: suite.plugins: 'own.py' has no plug-in: one is a class that ")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.py", "suite.plugins: 'absent.py': there is no such file in {folder}"),
        ("loop.py", "suite.plugins: 'loop.py' leads to no file"),
        ("a\\u0000.py", "suite.plugins: 'a\\x00.py' leads to no file"),
        ("folder", "suite.plugins: 'folder' is a folder; name a Python file"),
        ("text.txt", "suite.plugins: 'text.txt' is no Python file; its name must end in .py"),
        ("../out.py", "suite.plugins: '../out.py': there is no such file in {folder.parent}"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "text.txt").touch()
    path = _suite(tmp_path, ["bf16"], f'plugins = "{name}"')
    assert _refused(path) == f"{path}: {said.format(folder=tmp_path)}"


def test_a_broken_file_ends_the_command_with_two_and_no_traceback(tmp_path: Path) -> None:
    # In a process of its own, where torch has not been imported yet; a stand-in for it is quicker than itself.
    (tmp_path / "torch.py").touch()
    (tmp_path / "heavy.py").write_text("import torch\n")
    (tmp_path / "membench_plugins.py").write_text("import heavy\n")
    path = _suite(tmp_path, ["bf16"])
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom membench.cli import main\n"
         f"sys.exit(main(['run', {str(path)!r}]))"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        f"membench: {path}: plug-in file membench_plugins.py: what it imports loads torch; import that in the methods\n"
    )


def test_what_a_file_prints_is_not_taken_for_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "membench_plugins.py").write_text("print('loaded')\n")
    assert main(["run", str(_suite(tmp_path, ["bf16"])), "--dry-run"]) == 0
    output, errors = capsys.readouterr()
    assert output == "small/none/still/cpu\nsmall/bf16/still/cpu\n"
    assert errors == "loaded\n"


def test_one_class_that_keeps_no_contract_is_told_with_its_line_when_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(
        _HALVED.format(share=0.5) + "class Wrong(Technique):\n    def aply(self, module, context): return module\n"
    )
    membench.load_suite(_suite(tmp_path, ["keeps-a-part"]))
    path = _suite(tmp_path, ["wrong"])
    assert _refused(path) == (
        f"{path}: matrix.technique: technique 'wrong' of membench_plugins.py (class Wrong) in line 25 does not keep the"
        " contract: no stage is named 'aply'; did you mean 'apply'? A method of your own begins with '_'"
    )


def test_a_run_is_not_gone_on_with_once_a_file_has_changed(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.5))
    path = _suite(tmp_path, ["keeps-a-part"])
    begun = membench.run(membench.load_suite(path), keep=lambda _: False, output=tmp_path / "results")
    membench.run(membench.load_suite(path), keep=lambda _: False, output=tmp_path / "results", resume=True)

    def refused() -> str:
        with pytest.raises(ResultsError) as raised:
            membench.run(membench.load_suite(path), output=tmp_path / "results", resume=True)
        return str(raised.value)

    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.25))
    assert refused() == f"{begun.path}: plug-in file membench_plugins.py has changed since it began; run it afresh"
    (tmp_path / "membench_plugins.py").write_text("")
    path.write_text(path.read_text())
    with pytest.raises(MembenchError):
        membench.load_suite(path)


def test_a_file_that_is_edited_while_a_run_goes_on_fails_the_cases_that_are_left(tmp_path: Path) -> None:
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.5))
    suite = membench.load_suite(_suite(tmp_path, ["keeps-a-part"]))
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.25))
    record = membench.run(suite, output=tmp_path / "results").records[-1]
    assert record.status == "failed"
    assert record.message == "PluginError: membench_plugins.py has changed since the run began"


def test_each_of_two_commits_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = repository(tmp_path / "repository")
    _suite(here, ["keeps-a-part"])
    commit(here, "A half", {"membench_plugins.py": _HALVED.format(share=0.5)})
    commit(here, "A quarter", {"membench_plugins.py": _HALVED.format(share=0.25)})
    monkeypatch.chdir(here)
    with Interleaved(membench.load_suite("own.toml").with_repeats(1), "HEAD~1") as both:
        sides = both.measure(1)
    assert [_weights_mib(side)["keeps-a-part"] for side in sides] == [4, 2]
    told = judge(of_run(sides.base), of_run(sides.head), Tolerances()).sentences()
    assert any(line.startswith("small/keeps-a-part/still/cpu: its technique is not what it was: ") for line in told)
    assert not any(line.startswith("small/none/still/cpu: its ") for line in told)


def test_pytest_measures_a_suite_with_its_own_plug_ins(inner: pytest.Pytester) -> None:
    (inner.path / "membench_plugins.py").write_text(_HALVED.format(share=0.5))
    path = _suite(inner.path, ["keeps-a-part"])
    path.write_text(f'{path.read_text()}[limits]\nweights = "6 MiB"\n')
    result = inner.runpytest("own.toml", "-p", "no:benchmark")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*FAILED own.toml::small/none/still/cpu*"])


def test_listing_names_the_files_that_lie_here_and_runs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = f"from pathlib import Path\nPath({str(tmp_path / 'was-run')!r}).touch()\n"
    Path("membench_plugins.py").write_text(runs + _HALVED.format(share=0.5))
    Path("suites").mkdir()
    Path("suites", "membench_plugins.py").write_text(runs)
    for words in (["list"], ["list", "techniques"]):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert not any("keeps-a-part" in line for line in lines)
        assert [line.split() for line in lines[-3:]] == [
            ["plug-in", "files"],
            [f"{tmp_path}/membench_plugins.py", *["loaded", "for", "the", "suites", "beside", "it", "alone"]],
            [f"{tmp_path}/suites/membench_plugins.py", *["loaded", "for", "the", "suites", "beside", "it", "alone"]],
        ]
    assert main(["list", "a-quarter"]) == 2
    assert main(["list", "bf16"]) == 0
    assert not Path("was-run").exists()


def test_listing_a_suite_knows_the_files_of_that_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "membench_plugins.py").write_text(_HALVED.format(share=0.5))
    path = _suite(tmp_path, ["a-quarter"])
    for name in (path.name, str(path)):
        assert main(["list", name]) == 0
        assert capsys.readouterr().out == "small/none/still/cpu\nsmall/a-quarter/still/cpu\n"
        assert main(["list", name, "a-quarter"]) == 0
        assert "share  number  default 0.25" in capsys.readouterr().out
    assert main(["list", "techniques", "a-quarter"]) == 2
    assert "'techniques' is not a suite" in capsys.readouterr().err


@pytest.mark.parametrize("isolation", ["fork", "spawn"])
def test_a_file_of_the_current_folder_replaces_no_module_of_python_in_the_measured_process(
    tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "socket", "ctypes", "random", "pydantic"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nraise SystemExit(name)\n")
    (tmp_path / "helper_of_mine.py").write_text("SHARE = 0.5\n")
    (tmp_path / "membench_plugins.py").write_text(
        "from membench.plugins import Technique\nclass Halved(Technique):\n    acts_on = 'weights'\n"
        "    def apply(self, module, context):\n        import helper_of_mine, torch\n"
        "        kept = int(len(module.weight) * helper_of_mine.SHARE)\n"
        "        module.weight = torch.nn.Parameter(module.weight[:kept].clone(), False)\n        return module\n"
    )
    path = _suite(tmp_path, ["halved"])
    path.write_text(f'{path.read_text()}isolation = "{isolation}"\n')
    monkeypatch.chdir(tmp_path)
    run = membench.run(membench.load_suite(path), output=tmp_path / "results")
    assert _weights_mib(run) == {"none": 8, "halved": 4}
    assert not (tmp_path / "was-run").exists()


def test_a_package_is_chosen_in_matrix_stack_variant_and_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    install(
        site,
        "Other.Parts",
        "[membench.models]\nballast = other_parts_local:Ballast\n[membench.techniques]\nbf16 = other_parts_local:Bf16\n"
        "none = other_parts_local:Bf16\n",
        {
            "other_parts_local.py": "from typing import ClassVar\nfrom membench.plugins import Model, Technique\n"
            "class Bf16(Technique):\n    presets: ClassVar = {'twice': {'times': 2}}\n    times: int = 1\n"
            "class Ballast(Model):\n    def build(self, context): ...\n"
        },
    )
    path = _suite(tmp_path, ["other-parts:bf16+fp16", "Other_Parts:bf16-twice+membench:bf16", "mine"])
    path.write_text(
        path.read_text().replace('use = "ballast"', 'use = "membench:ballast"')
        + '[technique.mine]\nuse = "other_parts:bf16"\ntimes = 3\n[[exclude]]\ntechnique = "*:bf16+fp16"\n'
    )
    suite = membench.load_suite(path)
    assert [case.id for case in suite.cases] == [
        "small/none/still/cpu",
        "small/Other_Parts:bf16-twice/still/cpu",
        "small/membench:bf16/still/cpu",
        "small/Other_Parts:bf16-twice+membench:bf16/still/cpu",
        "small/mine/still/cpu",
    ]
    assert [plugin.options for plugin in suite.cases[3].technique_plugins] == [{"times": 2}, {}]

    def refused(techniques: list[str]) -> str:
        return _refused(_suite(tmp_path, techniques)).removeprefix(f"{path}: ")

    path.write_text(path.read_text().replace("membench:ballast", "ballast"))
    assert "write 'membench:ballast' or 'other-parts:ballast'" in _refused(path) or (
        "write 'other-parts:ballast' or 'membench:ballast'" in _refused(path)
    )
    monkeypatch.setattr(sys.modules[__name__], "_SUITE", _SUITE.replace('"ballast"', '"membench:ballast"'))
    assert refused(["othr-parts:bf16"]) == (
        "matrix.technique: no package 'othr-parts' has a technique; did you mean 'other-parts'?"
    )
    assert refused(["other-parts:bf61"]) == (
        "matrix.technique: package 'other-parts' has no technique 'bf61'; did you mean 'bf16'?"
    )
    assert refused(["other-parts:none"]) == (
        "matrix.technique.0 = 'other-parts:none': the reference is written 'none'; no other package has it"
    )
    assert refused(["a:b:c"]).endswith("where two plug-ins have one name, write 'package:name'")
    assert refused(["membench:fp16+fp16"]) == (
        "matrix.technique = 'membench:fp16+fp16': 'membench:fp16' and 'fp16' are the same"
    )


_SPAWNS = """\
import multiprocessing
from membench.plugins import Technique


class Item:
    size = 7


def child(queue, item):
    queue.put(Item if item.size == 7 else None)


class Spawns(Technique):
    def apply(self, module, context):
        spawning = multiprocessing.get_context("spawn")
        queue = spawning.SimpleQueue()
        process = spawning.Process(target=child, args=(queue, Item()), daemon=True)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert queue.get() is Item
        return module
"""


def test_a_process_that_a_plug_in_spawns_finds_what_its_file_defines(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(_SPAWNS)
    run = membench.run(membench.load_suite(_suite(tmp_path, ["spawns"], 'plugins = ["own.py"]')), output=tmp_path)
    assert [(record.status, record.message) for record in run.records] == [("ok", None)] * 2
