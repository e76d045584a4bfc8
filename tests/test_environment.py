"""The machine's description, what of it matters, and how much memory is left, on machines that are made up."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment, nvml
from tests.test_observing_gpus import FakeNvml

MIB = 2**20

_EPYC = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse2 fma f16c avx2 avx512f avx512_bf16 avx512_vnni

processor\t: 1
flags\t\t: nothing
"""
_OLDER_EPYC = _EPYC.replace(": 17", ": 1").replace(" avx512f avx512_bf16 avx512_vnni", "")
_XEON = _EPYC.replace("AuthenticAMD", "GenuineIntel").replace("avx512f", "avx512f avx512_fp16 amx_bf16 amx_int8")
_GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1
"""

Described = Callable[[str], dict[str, Any]]


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Described:
    """Describes this machine with another processor."""

    def describe(cpu_info: str) -> dict[str, Any]:
        path = tmp_path / "cpuinfo"
        path.write_text(cpu_info)
        monkeypatch.setattr(environment, "_CPU_INFO", path)
        return environment.describe(2)

    return describe


@pytest.mark.parametrize(
    ("cpu_info", "cpu"),
    [
        (_EPYC, ("AuthenticAMD", "25", "17", "1", ["fma", "f16c", "avx2", "avx512f", "avx512_vnni", "avx512_bf16"])),
        (_OLDER_EPYC, ("AuthenticAMD", "25", "1", "1", ["fma", "f16c", "avx2"])),
        (_XEON, ("GenuineIntel", "25", "17", "1", ["fma", "f16c", "avx2", "avx512f", "avx512_vnni", "avx512_bf16",
                                                   "avx512_fp16", "amx_bf16", "amx_int8"])),
        (_GRAVITON, ("0x41", "8", "0xd40", "1", ["asimddp", "asimdhp", "bf16", "i8mm", "sve"])),
        ("", (None, None, None, None, None)),
    ],
)  # fmt: skip
def test_a_processor_is_known_by_generation_and_instructions(
    described: Described, cpu_info: str, cpu: tuple[Any, ...]
) -> None:
    assert tuple(described(cpu_info)["cpu"].values()) == cpu


def test_processors_of_one_name_are_not_taken_for_one(described: Described) -> None:
    first, second = described(_EPYC), described(_OLDER_EPYC)
    assert first["processor"] == second["processor"] == "AMD EPYC"
    assert environment.differences(first, second) == [
        "cpu.instructions: ['fma', 'f16c', 'avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16'],"
        " now ['fma', 'f16c', 'avx2']",
        "cpu.model: 17, now 1",
    ]
    assert environment.differences(first, described(_EPYC)) == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"cores": 64}, "cores: 2, now 64"),
        ({"threads": 8}, "threads: 2, now 8"),
        ({"python": "3.99.0"}, "python: 3.11.0, now 3.99.0"),
        ({"memory_bytes": 2**34}, f"memory_bytes: {2**35}, now {2**34}"),
        ({"packages": {"torch": "9.9"}}, "packages.torch: 2.13, now 9.9"),
        ({"variables": {"LD_PRELOAD": "libjemalloc.so"}}, "variables.LD_PRELOAD: None, now libjemalloc.so"),
        ({"gpus": "NVML: no driver"}, "gpus: 1, now NVML: no driver"),
        ({"gpus": [{"name": "A", "memory_bytes": 2**36, "driver": "551"}]}, "gpus.0.driver: 550, now 551"),
        ({"gpus": [{"name": "B", "memory_bytes": 2**36, "driver": "550"}]}, "gpus.0.name: A, now B"),
        ({"memory_bytes": 2**35 - 4096}, None),
        ({"gpus": None}, None),
        ({"gpus": [{"name": "A", "memory_bytes": 2**36, "driver": "550", "uuid": "another"}]}, None),
        ({"commit": "abcdef0"}, None),
    ],
)
def test_what_figures_depend_on_is_a_difference_and_nothing_else_is(
    changed: dict[str, Any], difference: str | None
) -> None:
    machine = {
        "processor": "P", "cpu": {"model": "17"}, "cores": 2, "memory_bytes": 2**35, "python": "3.11.0", "threads": 2,
        "packages": {"torch": "2.13"}, "variables": {"LD_PRELOAD": None}, "commit": "0123456",
        "gpus": [{"name": "A", "memory_bytes": 2**36, "driver": "550", "uuid": "one"}],
    }  # fmt: skip
    assert environment.differences(machine, machine | changed) == ([difference] if difference else [])


def test_gpus_are_described_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "gpus", lambda: (nvml.Gpus(FakeNvml()), None))
    assert [gpu["name"] for gpu in environment.describe(2, with_gpus=True)["gpus"]] == ["Accelerator"] * 2
    monkeypatch.setattr(nvml, "gpus", lambda: (None, "NVML: no driver"))
    assert environment.describe(2, with_gpus=True)["gpus"] == "NVML: no driver"
    assert environment.describe(2)["gpus"] is None


def _git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(("project", "is_known"), [("membench", True), ("a-strangers", False), (None, False)])
def test_only_a_checkout_of_membench_gives_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None, is_known: bool
) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    (tmp_path / "membench").mkdir()
    if project:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path / "membench")
    commit = environment.describe(2)["commit"]
    assert (commit is not None and len(commit) >= 7) == is_known


def test_the_commit_is_not_that_of_the_folder_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    own = environment.describe(2)["commit"]
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a stranger's")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment.describe(2)["commit"] == own


def _cgroup(folder: Path, names: tuple[str, str], limit: str, used: int, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


_V2 = ("memory.max", "memory.current")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups, of which this process is in /outer/inner."""
    tree, own = tmp_path / "cgroup", tmp_path / "own"
    tree.mkdir()
    own.write_text("12:memory:/outer/inner\n0::/outer/inner\n")
    monkeypatch.setattr(environment, "_CGROUPS", tree)
    monkeypatch.setattr(environment, "_OWN_CGROUPS", own)
    return tree


def test_what_a_container_may_take_is_what_is_available(cgroups: Path) -> None:
    _cgroup(cgroups / "outer" / "inner", _V2, str(100 * MIB), 40 * MIB, active_file=5 * MIB, inactive_file=10 * MIB)
    assert environment.available_bytes() == 75 * MIB


def test_the_tightest_limit_above_counts(cgroups: Path) -> None:
    _cgroup(cgroups / "outer" / "inner", _V2, "max", 40 * MIB)
    _cgroup(cgroups / "outer", _V2, str(60 * MIB), 50 * MIB)
    _cgroup(cgroups / "other", _V2, str(1 * MIB), 1 * MIB)
    assert environment.available_bytes() == 10 * MIB


def test_limits_of_version_1_count_as_well(cgroups: Path) -> None:
    _cgroup(cgroups / "memory" / "outer" / "inner", _V1, str(80 * MIB), 70 * MIB, total_inactive_file=3 * MIB)
    assert environment.available_bytes() == 13 * MIB


def test_a_container_over_its_limit_has_nothing_left(cgroups: Path) -> None:
    _cgroup(cgroups / "outer" / "inner", _V2, str(10 * MIB), 11 * MIB)
    assert environment.available_bytes() == 0


def test_without_a_limit_the_machine_decides(cgroups: Path) -> None:
    _cgroup(cgroups / "outer" / "inner", _V2, "max", 40 * MIB)
    assert environment.available_bytes() > 100 * MIB


def test_a_containers_cores_are_its_quota(cgroups: Path) -> None:
    (cgroups / "cpu.max").write_text("100000 100000\n")
    assert environment.usable_cores() == 1
