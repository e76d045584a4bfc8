"""Who may import what, and what the parent must not carry."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "membench"
_FILES = sorted(_PACKAGE.rglob("*.py"))
_LAYERS = _PACKAGE / "builtin" / "layers"  # torch modules, which must be classes at the top of a file to be pickled


def _imported_at_load(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    "path", [path for path in _FILES if _LAYERS not in path.parents], ids=lambda path: str(path.relative_to(_PACKAGE))
)
def test_no_module_but_layers_imports_torch_when_it_is_loaded(path: Path) -> None:
    imported = _imported_at_load(path)
    assert not {name.partition(".")[0] for name in imported} & {"torch", "transformers", "torchao"}
    assert not any(name.startswith("membench.builtin.layers") for name in imported)


@pytest.mark.parametrize("name", ["figures.py", "record.py", "report/text.py", "store.py", "suite.py", "units.py"])
def test_judging_does_not_import_measuring(name: str) -> None:
    measuring = {"membench.runner", "membench.worker", "membench.observer", "membench.session"}
    assert not _imported_at_load(_PACKAGE / name) & measuring


@pytest.mark.parametrize("name", ["worker.py", "meter.py", "forkserver.py", "checkpoint.py", "weights.py"])
def test_the_worker_does_not_import_the_runner(name: str) -> None:
    outside = {"membench.runner", "membench.nursery", "membench.observer", "membench.session", "membench.report.text"}
    assert not _imported_at_load(_PACKAGE / name) & outside


def test_listing_does_not_import_torch() -> None:
    code = (
        "import sys; from membench.cli import main; main(['list', 'quickstart']);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ci_uses_the_readmes_commands() -> None:
    root = _PACKAGE.parent
    assert "pip install torch==2.13.0 -e '.[dev]' && .ci/check" in (root / "README.md").read_text()
    script = (root / ".ci" / "run").read_text()
    assert "torch==2.13.0" in script
    assert "-e '.[dev]'" in script
    assert "\n.ci/check" in script
