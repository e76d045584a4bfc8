"""Which folder may import which, and what the parent process must not load."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "membench"
_FILES = sorted(_PACKAGE.rglob("*.py"))

# Imports go downwards only. `builtin` is above `worker`: techniques use how the worker finds a model's weights and
# breaks memory down, and the worker reaches techniques through the registry, like anyone's plug-ins. `protocol` is
# below `records`: a record keeps what a worker read as the worker's own types.
_FOLDERS = (
    "__main__", "cli", "pytest_plugin", "doctor", "testing", "__init__", "estimating", "comparing", "report",
    "regression", "builtin", "running", "worker", "suite", "data", "plugins", "records", "protocol", "host", "errors",
    "units",
)  # fmt: skip
_LARGEST_FILE_LINES, _MEDIAN_FILE_LINES = 400, 150
_IN_THE_MEASURED_PROCESS = {"testing", "builtin", "worker", "data"}
_HEAVY = {
    "torch", "transformers", "torchao", "bitsandbytes", "peft", "accelerate", "optimum", "safetensors", "triton",
    "numpy", "scipy", "pyarrow", "datasets", "sklearn", "datasketch",
}  # fmt: skip


def _imported(path: Path, *, types_too: bool = False) -> set[str]:
    """All names that a module imports, in functions too; those for type checkers alone where asked for."""
    return set(_imports_below(ast.parse(path.read_text()), types_too))


def _imports_below(node: ast.AST, types_too: bool = False) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not types_too:
            yield from _imports_below(ast.Module(child.orelse, []))
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are written in full"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
            yield from (argument.value for argument in child.args
                        if isinstance(argument, ast.Constant) and isinstance(argument.value, str))  # fmt: skip
        yield from _imports_below(child, types_too)


def _imported_at_load(path: Path) -> set[str]:
    """The names that a module imports before anything of it is called."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(_imports_below(ast.Module([node], [])))
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


_NAMES = {_name(path) for path in _FILES}


def _own(imported: set[str]) -> set[str]:
    """The modules of the package among what is imported."""
    found = set()
    for full in imported:
        parts = full.split(".")
        if parts[0] == "membench":
            # ``from membench.records.run_file import Run`` names a module and something in it.
            found.add(next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in _NAMES))
    return found


def _folder(name: str) -> str:
    """The folder that a module is in, or its own name if it lies beside the folders."""
    return (*name.split("."), "__init__")[1]


def _is_layer(name: str) -> bool:
    """Modules that subclass torch's classes cannot do without torch; they are imported by methods."""
    return name.startswith(("membench.builtin.layers.", "membench.worker.tracing.")) or name in (
        "membench.data.loading",
        "membench.worker.decoder",
    )


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_imports_go_to_the_same_folder_or_one_further_down(path: Path) -> None:
    above = _FOLDERS[: _FOLDERS.index(_folder(_name(path)))]
    assert not {name for name in _own(_imported(path, types_too=True)) if _folder(name) in above}


def test_measuring_and_judging_stay_apart_and_the_parent_measures_nothing() -> None:
    for path in _FILES:
        folder, imported = _folder(_name(path)), _own(_imported(path))
        if folder in ("report", "regression"):
            assert "running" not in map(_folder, imported), path
        if folder not in _IN_THE_MEASURED_PROCESS:
            # Skeletons are text files that are copied.
            assert not {*map(_folder, imported - {"membench.testing.skeletons"})} & _IN_THE_MEASURED_PROCESS, path
    # The worker comes after the fork.
    assert _own(_imported_at_load(_PACKAGE / "worker" / "fork_server.py")) == {
        "membench.worker.allocator", "membench.data.corpus", "membench.protocol.forking", "membench.protocol.marks",
        "membench.host.procfs", "membench.host.scratch", "membench.worker.launcher", "membench.worker.python_blocks",
    }  # fmt: skip


def test_no_two_modules_lead_to_each_other() -> None:
    leads_to = {_name(path): _own(_imported(path, types_too=True)) - {_name(path)} for path in _FILES}
    settled = {"membench"}  # it loads what is asked of it, later
    while left := leads_to.keys() - settled:
        free = {name for name in left if leads_to[name] <= settled}
        assert free, f"each of these leads to another of them: {sorted(left)}"
        settled |= free


def test_files_are_short() -> None:
    lines = {_name(path): len(path.read_text().splitlines()) for path in _FILES}
    assert {name for name, count in lines.items() if count > _LARGEST_FILE_LINES} == set()
    assert statistics.median(lines.values()) < _MEDIAN_FILE_LINES


@pytest.mark.parametrize("path", [path for path in _FILES if path.name == "__init__.py"], ids=_name)
def test_every_folder_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_no_module_imports_a_large_library_when_it_is_loaded(path: Path) -> None:
    at_load = _imported_at_load(path)
    if not _is_layer(_name(path)):
        assert not {name.partition(".")[0] for name in at_load} & _HEAVY
        assert not any(map(_is_layer, _own(at_load)))


def test_loading_every_module_loads_no_large_library() -> None:
    names = sorted(name for name in _NAMES if not _is_layer(name))
    code = f"import sys; [__import__(name) for name in {names}]; print(set(sys.modules) & {_HEAVY})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("set()\n", "")


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_large_libraries_are_imported_in_the_measured_process_alone(path: Path) -> None:
    heavy = {name.partition(".")[0] for name in _imported(path)} & _HEAVY
    if _name(path) == "membench.regression.timing":
        heavy -= {"numpy", "scipy"}  # statistics of the results, when all measuring is done
    assert not heavy or _folder(_name(path)) in _IN_THE_MEASURED_PROCESS


def test_every_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import one\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import types_alone\nelse:\n"
        "    import otherwise\ndef f():\n    with x:\n        from two.three import four\n"
        "    importlib.import_module('five.six')\nclass C:\n    def g(self):\n        try:\n            import seven\n"
        "        except ImportError:\n            pass\n"
    )
    seen = {"one", "typing.TYPE_CHECKING", "otherwise", "two.three.four", "five.six", "seven"}
    assert _imported(path) == seen
    assert _imported(path, types_too=True) == {*seen, "types_alone"}
    assert _imported_at_load(path) == {"one", "typing.TYPE_CHECKING"}


def test_folders_are_told_from_names() -> None:
    assert [*map(_folder, ("membench", "membench.units", "membench.cli", "membench.report.text"))] == [
        "__init__", "units", "cli", "report"
    ]  # fmt: skip
    assert _own({"membench.plugins.Technique", "membench.plugins.registry", "membench.run", "os"}) == {
        "membench.plugins", "membench.plugins.registry", "membench"
    }  # fmt: skip


def test_listing_does_not_import_torch() -> None:
    code = (
        "import sys; from membench.cli import main; main(['list', 'quickstart']); import membench.doctor;"
        f"assert not {_HEAVY} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ci_uses_the_readmes_commands() -> None:
    root = _PACKAGE.parent
    assert "pip install torch==2.13.0 -e '.[dev]' && .ci/check" in (root / "README.md").read_text()
    script = (root / ".ci" / "run").read_text()
    assert "torch==2.13.0" in script
    assert "-e '.[dev]'" in script
    assert "\n.ci/check" in script
