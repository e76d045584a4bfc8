"""Suites in Python: what TOML says as arguments, in files that membench and pytest run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.errors import ResultsError, SuiteError
from membench.protocol.case import Case
from membench.running import session
from membench.suite.loading import description
from membench.suite.rules import rules_of
from membench.suite.suite import Suite
from membench.suite.tolerances import Tolerance
from tests.repositories import commit, git

pytest_plugins = ["pytester"]

_TOML = """\
[suite]
name = "sizes"
description = "Which size?"
[matrix]
model = ["b1", "b2"]
technique = ["none", "bf16", "fp16"]
workload = ["still"]
[[exclude]]
model = "b1"
technique = "fp16"
[[include]]
model = "b1"
technique = "none"
workload = "burst"
[model.b1]
use = "ballast"
mib = 1
[model.b2]
use = "ballast"
mib = 2
[workload.still]
use = "burst"
mib = 0
[settings]
measured_steps = 2
[limits]
peak_live = "10 MiB"
[regression]
time = "off"
[gate]
rules = ["weights <= reference"]
"""

_PYTHON = """\
from membench import Suite

SIZES = range(1, 3)
suite = Suite(
    "sizes",
    description="Which size?",
    matrix={"model": [f"b{n}" for n in SIZES], "technique": ("none", "bf16", "fp16"), "workload": ["still"]},
    exclude=[{"model": "b1", "technique": "fp16"}],
    include=[{"model": "b1", "technique": "none", "workload": "burst"}],
    model={f"b{n}": {"use": "ballast", "mib": n} for n in SIZES},
    workload={"still": {"use": "burst", "mib": 0}},
    settings={"measured_steps": 2},
    limits={"peak_live": "10 MiB"},
    regression={"time": "off"},
    gate={"rules": ["weights <= reference"]},
)
"""

_SMALL = """\
import membench


def small(name, *arguments):
    return membench.Suite(name, script={"module": "this", "arguments": arguments})
"""


def written(folder: Path, text: str, name: str = "suites.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def cases_of(suite: Suite) -> tuple[tuple[Case, ...], Any, Any, Any]:
    return suite.cases, suite.settings, suite.limits, (suite.tolerances, [gate.text for gate in suite.gates])


def test_a_suite_in_python_is_what_the_same_tables_in_toml_are(tmp_path: Path) -> None:
    python = membench.load_suite(written(tmp_path, _PYTHON))
    toml = membench.load_suite(written(tmp_path, _TOML, "sizes.toml"))
    assert cases_of(python) == cases_of(toml)
    assert (python.name, python.description) == (toml.name, toml.description)
    cuda = [membench.load_suite(tmp_path / name, ["cuda"]).cases for name in ("suites.py", "sizes.toml")]
    assert cuda[0] == cuda[1]
    assert {case.device for case in cuda[0]} == {"cuda"}


_WRONG = {
    'matrix={"model": ["blok"], "technique": ["none"], "workload": ["burst"]}': (
        "matrix.model: no model is named 'blok'; did you mean 'block'?"
    ),
    'matrix={"model": "block", "technique": ["none"], "workload": ["burst"]}': (
        "matrix.model = 'block': expected a list: ['block']"
    ),
    "": "'matrix' is missing",
    'matrix={}, script={"file": "x.py"}': (
        "'script' and 'matrix' do not go together: a suite is of cases, or of a program"
    ),
    'matrix={"model": [len], "technique": ["none"], "workload": ["burst"]}': (
        "matrix.model.0: a suite holds text, numbers, true or false, lists and tables, not builtin_function_or_method"
    ),
    'matrix={"model": ["block"], "technique": ["none"], "workload": ["burst"]}, limits={"peak_live": float("inf")}': (
        "limits.peak_live = inf: expected a finite number"
    ),
    'matrix={"model": ["block"], "technique": ["none"], "workload": ["burst"]}, settings={1: 2}': (
        "settings: 1 is a key, and must be text"
    ),
    'script={"file": "nope.py"}': "script.file = 'nope.py': there is no such file",
    'script={"file": "suites.py", "module": "x"}': (
        "script = {file = 'suites.py', module = 'x'}: name a file or a module, one of them"
    ),
    'script={"file": "suites.py"}, exclude=[{"model": "x"}]': (
        "unknown key 'exclude'; known: gate, limits, regression, script, settings, suite"
    ),
    'script={"file": "suites.py"}, settings={"warmup_steps": 3}': (
        "unknown key 'settings.warmup_steps'; known: repeats, sampling_interval_s, timeout_s"
    ),
}


def test_what_is_wrong_is_said_as_of_toml_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {}
    for arguments in _WRONG:
        path = written(tmp_path, f'import membench\nsuite = membench.Suite("s", {arguments})\n')
        with pytest.raises(SuiteError) as raised:
            membench.load_suite(path.name)
        said[arguments] = str(raised.value)
    assert said == {arguments: f"suites.py: {message}" for arguments, message in _WRONG.items()}


def test_made_elsewhere_its_errors_begin_with_its_name() -> None:
    with pytest.raises(SuiteError, match=r"^suite 's': 'matrix' is missing$"):
        membench.Suite("s")


_BROKEN = {
    "x = 1\nraise RuntimeError('not\\nnow')\n": ", line 2: RuntimeError: not",
    "def f(:\n": ", line 1: invalid syntax",
    "\nreturn 3\n": ", line 2: 'return' outside function",
    "import sys\nsys.exit(3)\n": ", line 2: SystemExit: 3",
    "import nowhere_to_be_found\n": ", line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "x = 1\n": " makes no suite: assign a membench.Suite(...) to a variable",
    "import beside\n": ", line 1: ZeroDivisionError: division by zero",
    "x = '\0'\n": ": ",
    f"{_SMALL}a = small('a')\nb = small('b')\n": " makes 2 suites; name one: suites.py::a, suites.py::b",
    f"{_SMALL}both = [small('a'), small('a', '2')]\n": ": two suites are named 'a'",
}


def test_a_file_that_makes_no_suite_to_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "1 / 0\n", "beside.py")
    for text, message in _BROKEN.items():
        written(tmp_path, text)
        with pytest.raises(SuiteError) as raised:
            membench.load_suite("suites.py")
        assert str(raised.value).startswith(f"suites.py{message}")
        assert "\n" not in str(raised.value)


def test_a_file_beside_a_suite_replaces_no_module_of_python(tmp_path: Path) -> None:
    written(tmp_path, "raise RuntimeError('this was run')\n", "colorsys.py")
    written(tmp_path, "NAME = 'one'\n", "names_of_mine.py")
    path = written(tmp_path, f"{_SMALL}import colorsys, names_of_mine\none = small(names_of_mine.NAME)\n")
    assert membench.load_suite(path).name == "one"
    assert str(tmp_path) not in sys.path


def test_a_suite_that_imports_torch_is_refused(tmp_path: Path) -> None:
    written(tmp_path, f"{_SMALL}import torch\none = small('one')\n")
    code = "import sys; from membench.cli import main; sys.exit(main(['list', 'suites.py']))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("membench: suites.py imports torch, itself or through what it imports; ")
    assert ran.stderr.count("\n") == 1


def test_one_of_several_suites_is_chosen_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, f"{_SMALL}all = {{'x': [small('a')], 'y': (small('b', '2'),)}}\nagain = all['x'][0]\n")
    assert membench.load_suite(f"{path}::b").cases[0].model_plugin.options == {"module": "this", "arguments": ["2"]}
    with pytest.raises(SuiteError, match=r"makes no suite 'c'; known: a, b$"):
        membench.load_suite(f"{path}::c")
    with pytest.raises(SuiteError, match="only a file in Python makes several suites"):
        membench.load_suite(f"{written(tmp_path, _TOML, 'sizes.toml')}::a")


def test_a_suite_may_import_what_lies_beside_it_and_print(tmp_path: Path) -> None:
    written(tmp_path, "names = ['a']\n", "beside_the_suite.py")
    path = written(tmp_path, f"{_SMALL}import beside_the_suite\nprint('hello')\n"
                             "made = [small(name) for name in beside_the_suite.names]\n")  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "membench", "run", str(path), "--dry-run"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "this/none/script/cpu\n", "hello\n")


def test_what_a_file_says_of_itself_is_told_without_running_it_unless_only_its_suite_says_so(tmp_path: Path) -> None:
    assert description(written(tmp_path, '"""Which size?\n\nMore."""\n1 / 0\n')) == "Which size?"
    with pytest.raises(SuiteError, match="division by zero"):
        description(written(tmp_path, "1 / 0\n"))


def test_a_suite_in_python_takes_plug_ins_beside_it(tmp_path: Path) -> None:
    written(tmp_path, "from membench.plugins import Technique\n\n\nclass Mine(Technique):\n    acts_on = 'weights'\n",
            "own_plugins.py")  # fmt: skip
    path = written(tmp_path, "import membench\nsuite = membench.Suite('s', plugins=['own_plugins.py'], matrix={"
                             "'model': ['block'], 'technique': ['mine'], 'workload': ['burst']})\n")  # fmt: skip
    suite = membench.load_suite(path)
    assert [case.technique for case in suite.cases] == ["none", "mine"]
    assert [file.name for file in suite.plugin_files] == ["own_plugins.py"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, membench.Run]:
    folder = tmp_path_factory.mktemp("kept")
    path = written(folder, _PYTHON)
    run = membench.run(membench.load_suite(path), keep=lambda case_id: case_id == "b1/bf16/still/cpu", output=folder)
    return path, run


def test_a_run_keeps_the_text_and_what_it_came_to(kept: tuple[Path, membench.Run]) -> None:
    path, run = kept
    assert [record.status for record in run.records] == ["ok", "ok"]
    assert run.header["suite_text"] == path.read_text()
    assert run.header["suite_tables"]["model"] == {
        "b1": {"use": "ballast", "mib": 1},
        "b2": {"use": "ballast", "mib": 2},
    }
    tolerances, gates = rules_of(run.header)
    assert [(each.metric.name, each.shown) for each in tolerances] == [("time", "off")]
    assert all(isinstance(each, Tolerance) for each in tolerances)
    assert [gate.text for gate in gates] == ["weights <= reference"]


def test_a_run_goes_on_as_long_as_the_suite_comes_to_the_same(kept: tuple[Path, membench.Run], tmp_path: Path) -> None:
    path, run = kept
    same = membench.load_suite(written(tmp_path, f"# of another text\n{path.read_text()}"))
    assert session.resumable(same, run.path.parent) == run.path
    other = membench.load_suite(written(tmp_path, path.read_text().replace("10 MiB", "11 MiB")))
    with pytest.raises(ResultsError, match="its suite 'sizes' is not 'sizes' as it is now"):
        session.resumable(other, run.path.parent)


def test_a_suite_made_by_a_program_is_run_as_it_is(tmp_path: Path) -> None:
    run = membench.run(membench.Suite("made", script={"module": "this"}), output=tmp_path)
    assert [record.id for record in run.records] == ["this/none/script/cpu"]
    assert json.loads(run.header["suite_text"]) == run.header["suite_tables"]


def test_another_commits_suite_is_its_own_file(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    program = "x = bytearray(b'1') * (32 * 2**20)\n"
    suite = "import membench\nsuite = membench.Suite('mine', script={'file': 'own.py'})\n"
    commit(tmp_path, "The program", {"own.py": program, "suites.py": suite, ".gitignore": "results\n"})
    written(tmp_path, program.replace("32", "96"), "own.py")
    ran = subprocess.run(
        [sys.executable, "-m", "membench", "run", "suites.py", "--against-ref", "HEAD", "--repeats", "1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    assert "regressed: own/none/script/cpu: peak_footprint" in ran.stdout


def test_pytest_collects_a_suite_that_is_named_alone(inner: pytest.Pytester) -> None:
    inner.makepyfile(suites=f"{_SMALL}one = small('one')\n")
    found = inner.runpytest_subprocess("-p", "no:benchmark", "-v", "suites.py")
    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["suites.py::this/none/script/cpu PASSED*"])
    inner.makepyfile(test_other="def test_x(): pass\n")
    inner.runpytest_subprocess("-p", "no:benchmark", ".").assert_outcomes(passed=1)


def test_pytest_names_the_suite_where_a_file_makes_several(inner: pytest.Pytester) -> None:
    inner.makepyfile(suites=f"{_SMALL}all = [small('one'), small('two')]\n")
    listed = inner.runpytest_subprocess("--collect-only", "-q", "suites.py")
    listed.stdout.fnmatch_lines(["suites.py::one::this/none/script/cpu", "suites.py::two::this/none/script/cpu"])
    inner.runpytest_subprocess("-p", "no:benchmark", "suites.py::two").assert_outcomes(passed=1)


def test_pytest_still_collects_tests_beside_a_suite_and_no_suite_of_a_tests_own(inner: pytest.Pytester) -> None:
    inner.makepyfile(test_both=f"{_SMALL}\n\ndef test_x():\n    assert small('x').name == 'x'\n")
    listed = inner.runpytest_subprocess("--collect-only", "-q", "test_both.py")
    assert [line for line in listed.outlines if "::" in line] == ["test_both.py::test_x"]
    inner.makepyfile(test_both="import membench\n\ndef test_x(): pass\n\n"
                               "suite = membench.Suite('s', script={'module': 'this'})\n")  # fmt: skip
    listed = inner.runpytest_subprocess("--collect-only", "-q", "test_both.py")
    assert [line for line in listed.outlines if "::" in line] == [
        "test_both.py::test_x",
        "test_both.py::this/none/script/cpu",
    ]


def test_pytest_tells_what_is_wrong_with_a_suite(inner: pytest.Pytester) -> None:
    inner.makepyfile(suites="import membench\nsuite = membench.Suite('s')\n")
    found = inner.runpytest_subprocess("suites.py")
    assert found.ret != 0
    found.stdout.fnmatch_lines(["suites.py: 'matrix' is missing"])


def test_pytest_runs_a_suite_that_measures_a_script(inner: pytest.Pytester) -> None:
    inner.path.joinpath("own.py").write_text("print('here I am'); raise ValueError('boom')\n")
    inner.path.joinpath("mine.toml").write_text('[suite]\nname = "mine"\n[script]\nfile = "own.py"\n')
    found = inner.runpytest_subprocess("-p", "no:benchmark", "mine.toml")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(
        ["own/none/script/cpu ended as failed in phase script: ended with exit code 1: ValueError: boom"]
    )
    assert os.path.exists(inner.path / "results")
