"""Registers the tests' own plug-ins, as an installed distribution would, for this process and for workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

# A pytest that runs inside a test's process has Python forget the modules it imported; half of a pair that knows each
# other's classes must not be among them.
import membench.suite.loading  # noqa: F401
from tests import fresh_environment
from tests.fresh_environment import FreshEnvironment

collect_ignore = ["example_plugin"]  # whose tests run where it is installed

_ENTRY_POINTS = """\
[membench.models]
block = tests.amounts:Block
factory-of-transformers = tests.shapes:FactoryOfTransformers
net = tests.growth:Net
too-large = tests.amounts:TooLarge
[membench.workloads]
known-burst = tests.amounts:Burst
parent-then-child = tests.amounts:Apart
reports = tests.odd_values:Reports
[membench.techniques]
ends = tests.amounts:Ends
grows = tests.growth:Grows
reports-fact = tests.odd_values:ReportsFact
"""


@pytest.fixture(scope="session", autouse=True)
def _plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site")
    info = site / "membench_amounts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: membench-amounts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parent.parent}")
        # Tests run beside each other: the machine is never calm. Those of waiting for it say for how long.
        patch.setenv("MEMBENCH_CALM_WITHIN_S", "0")
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The wheel of membench, installed beside it in ``site``; made once, however many workers of xdist there are."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder = shared / "wheel-of-membench"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "site").exists():
            fresh_environment.install_wheel(folder / "site")
    (found,) = (folder / "wheels").glob("*.whl")
    return found


@pytest.fixture
def fresh(tmp_path: Path, wheel: Path) -> FreshEnvironment:
    """An environment with membench from its wheel."""
    return FreshEnvironment(tmp_path / "environment", wheel.parent.parent / "site")


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    """A suite of one known block and burst, to be written to."""
    return tmp_path / "known.toml"


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Runs pytest within pytest, as if no other were around it."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    return pytester
