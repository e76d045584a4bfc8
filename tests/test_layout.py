"""Who may import what, and what the parent must not carry."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "membench"
_FILES = sorted(_PACKAGE.rglob("*.py"))

_HEAVY = {
    "torch", "transformers", "torchao", "bitsandbytes", "peft", "accelerate", "optimum", "safetensors", "triton",
    "numpy", "scipy", "pyarrow", "datasets", "sklearn", "datasketch",
}  # fmt: skip
_MEASURED = {
    "allocator", "assembly", "calls", "census", "checkpoint", "device", "forkserver", "meter", "notes", "quality",
    "stand_in", "weights", "worker",
}  # fmt: skip
_GROUPS = {
    "ground": {"amounts", "contract", "contract_check", "corpus", "errors", "foreign", "names", "nvml", "packages",
               "phases", "plugin_files", "plugins", "procfs", "quantities", "record", "registry", "scratch", "sending",
               "units", "validation", "environment", "data.storage"},
    "training data": {"data"},
    "rules": {"regression.gates", "regression.tolerances"},
    "suites": {"expansion", "listing", "python_files", "selection", "skeletons", "suite", "suite_names", "tables"},
    "measured process": _MEASURED,
    "plug-ins": {"builtin"},
    "plug-ins' tests": {"testing"},
    "runner's process": {"figures", "marked", "nursery", "observer", "programs", "runner", "session"},
    "records": {"compare", "regression", "report", "schema", "store", "strict_json"},
    "programs": {"__init__", "__main__", "calibrating", "checking", "cli", "console", "doctor", "interleaving",
                 "progress", "pytest_plugin", "side", "worktree"},
}  # fmt: skip
_MAY_IMPORT = {
    "ground": {"ground"},
    "rules": {"ground", "rules"},
    "suites": {"ground", "rules", "suites"},
    "training data": {"ground", "training data"},
    "measured process": {"ground", "training data", "measured process"},
    "plug-ins": {"ground", "training data", "measured process", "plug-ins"},
    "plug-ins' tests": {"ground", "training data", "measured process", "plug-ins", "plug-ins' tests"},
    "runner's process": {"ground", "rules", "suites", "records", "runner's process"},
    "records": {"ground", "rules", "records"},
    "programs": {"ground", "rules", "suites", "records", "runner's process", "programs"},
}


def _imported(path: Path) -> set[str]:
    """All that a module imports, in functions too, but not for types alone."""
    return set(_imports_below(ast.parse(path.read_text())))


def _imports_below(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
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
        yield from _imports_below(child)


def _imported_at_load(path: Path) -> set[str]:
    """What a module imports before anything of it is called."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(_imports_below(ast.Module([node], [])))
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(_PACKAGE).with_suffix("").parts)


def _own(imported: set[str]) -> set[str]:
    """Those of our own modules that are imported, by name below the package."""
    names = {_name(path) for path in _FILES}
    found = set()
    for full in imported:
        if full == "membench" or full.startswith("membench."):
            parts = full.split(".")[1:]
            # ``from membench.records.run_file import Run`` names a module and something in it.
            known = [".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in names]
            found |= set(known[:1]) or {"__init__"}
    return found


def _group(name: str) -> str:
    # A module may be in another group than its package: the contract knows how data are kept, not who keeps them.
    for named in (name, name.partition(".")[0]):
        if found := [group for group, members in _GROUPS.items() if named in members]:
            (group,) = found
            return group
    raise AssertionError(f"{name} is in no group")


def _is_layer(name: str) -> bool:
    """Modules of torch's own kind cannot do without it; they are imported by methods."""
    return name.startswith("builtin.layers.") or name in ("data.loading", "testing.decoder")


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_no_module_imports_a_large_library_when_it_is_loaded(path: Path) -> None:
    at_load = _imported_at_load(path)
    if not _is_layer(_name(path)):
        assert not {name.partition(".")[0] for name in at_load} & _HEAVY
        assert not any(map(_is_layer, _own(at_load)))


def test_loading_every_module_loads_no_large_library() -> None:
    names = [f"membench.{_name(path)}".removesuffix(".__init__") for path in _FILES if not _is_layer(_name(path))]
    code = f"import sys; [__import__(name) for name in {names}]; print(set(sys.modules) & {_HEAVY})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("set()\n", "")


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_large_libraries_are_imported_in_the_measured_process_alone(path: Path) -> None:
    heavy = {name.partition(".")[0] for name in _imported(path)} & _HEAVY
    if _name(path) == "regression.timing":
        heavy -= {"numpy", "scipy"}  # statistics of what was measured, when all measuring is done
    assert not heavy or _group(_name(path)) in ("training data", "measured process", "plug-ins", "plug-ins' tests")


@pytest.mark.parametrize("path", _FILES, ids=_name)
def test_imports_go_in_the_directions_that_the_table_allows(path: Path) -> None:
    allowed = _MAY_IMPORT[_group(_name(path))]
    strayed = {name: _group(name) for name in _own(_imported(path)) if _group(name) not in allowed}
    if _name(path) == "forkserver":
        # The worker comes after the fork.
        assert _own(_imported_at_load(path)) == {"allocator", "corpus", "phases", "procfs", "scratch"}
    assert strayed == {}


def test_no_two_modules_lead_to_each_other() -> None:
    leads_to = {_name(path): _own(_imported(path)) - {_name(path)} for path in _FILES}
    settled: set[str] = {"__init__"}  # it loads what is asked of it, later
    while left := leads_to.keys() - settled:
        free = {name for name in left if leads_to[name] <= settled}
        assert free, f"each of these leads to another of them: {sorted(left)}"
        settled |= free


def test_every_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import one\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import types_alone\nelse:\n"
        "    import otherwise\ndef f():\n    with x:\n        from two.three import four\n"
        "    importlib.import_module('five.six')\nclass C:\n    def g(self):\n        try:\n            import seven\n"
        "        except ImportError:\n            pass\n"
    )
    assert _imported(path) == {"one", "typing.TYPE_CHECKING", "otherwise", "two.three.four", "five.six", "seven"}
    assert _imported_at_load(path) == {"one", "typing.TYPE_CHECKING"}


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
