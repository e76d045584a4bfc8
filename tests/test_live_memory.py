"""Known amounts of memory of every kind, and what is read of them: as live, as pages of files, or as a bound."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import pytest

import membench
from membench.records.record import Record

pytest_plugins = ["pytester"]

MIB = 2**20

_FUNCTIONS = """\
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

MIB = 2**20

def small(count, size):
    return [bytes(size) for _ in range(count)]

def small_for_a_moment(count, size):
    small(count, size)
    return bytearray(b"1") * 8 * MIB

def mapped_for_a_moment(path, beside):
    held = bytearray(b"1") * beside
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 64 * MIB, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    mapping.close()
    os.close(descriptor)
    return held

def read_as_a_whole(path):
    return Path(path).read_bytes()

def shared(size):
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    mapping.write(b"1" * size)
    return mapping

def shared_file(size):
    descriptor = os.memfd_create("shared")
    os.truncate(descriptor, size)
    mapping = mmap.mmap(descriptor, size)
    os.close(descriptor)
    mapping[:] = b"1" * size
    return mapping

KEPT = []

def leaves_holes(with_child):
    if not KEPT:
        whole = [bytes(3000) for _ in range(40000)]
        KEPT.extend(whole[::2])
        del whole
    if with_child:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.2)"])

def holes_of_a_thread(count):
    kept = []

    def work():
        kept.extend([bytes(3000) for _ in range(count)][::2])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return kept

def closes_standard_error():
    try:
        os.close(2)
    except OSError:
        pass

class Cycle:
    def __init__(self):
        self.itself = self
        self.held = bytearray(b"1") * 32 * MIB

def leaves_cycles():
    Cycle()

@pytest.mark.parametrize("count", [4000, 16000])
def test_small(membench, count):
    membench(small, count, 100)

def test_small_for_a_moment(membench):
    membench(small_for_a_moment, 16000, 100)

@pytest.mark.parametrize("beside", [0, 32 * MIB])
def test_mapped(membench, tmp_path, beside):
    path = tmp_path / "file"
    path.write_bytes(b"1" * 64 * MIB)
    membench(mapped_for_a_moment, str(path), beside)

def test_read(membench, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1" * 64 * MIB)
    membench(read_as_a_whole, str(path))

def test_shared(membench):
    membench(shared, 64 * MIB)

def test_shared_file(membench):
    membench(shared_file, 64 * MIB)

@pytest.mark.parametrize("with_child", [False, True])
def test_holes(membench, with_child):
    membench(leaves_holes, with_child)

def test_holes_of_a_thread(membench):
    membench(holes_of_a_thread, 8000)

def test_closed(membench):
    membench(closes_standard_error)

def test_cycles(membench):
    membench(leaves_cycles)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The records of the functions above, by the name of their test."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "test_known.py").write_text(_FUNCTIONS)
    with contextlib.chdir(folder):
        assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", str(folder)]) == 0
    (path,) = (folder / "results").glob("pytest-*.jsonl")
    return {record.id.rpartition("::")[2]: record for record in membench.read_run(path).records}


def _read(record: Record, field: str) -> float:
    value = record.metrics[field]
    assert value is not None, record.reasons
    return value


@pytest.mark.parametrize("count", [4000, 16000])
def test_small_objects_do_not_hide_in_free_blocks_of_python(functions: dict[str, Record], count: int) -> None:
    # 133 bytes in blocks of 144, and 8 in the list
    record = functions[f"test_small[{count}]"]
    assert _read(record, "held_live_bytes") == pytest.approx(count * 152, rel=0.1)
    assert _read(record, "peak_live_bytes") == pytest.approx(count * 152, rel=0.1, abs=3 * 2**17)


def test_blocks_that_python_keeps_of_small_objects_are_not_held(functions: dict[str, Record]) -> None:
    assert _read(functions["test_small_for_a_moment"], "held_live_bytes") == pytest.approx(8 * MIB, rel=0.02)


@pytest.mark.parametrize("beside", [0, 32 * MIB])
def test_a_file_that_is_mapped_for_a_moment_is_not_live(functions: dict[str, Record], beside: int) -> None:
    record = functions[f"test_mapped[{beside}]"]
    assert _read(record, "peak_live_bytes") == pytest.approx(beside, rel=0.05, abs=MIB)
    assert _read(record, "peak_footprint_bytes") >= 64 * MIB


def test_a_file_that_is_read_into_memory_is_live(functions: dict[str, Record]) -> None:
    assert _read(functions["test_read"], "peak_live_bytes") == pytest.approx(64 * MIB, rel=0.01)


@pytest.mark.parametrize("test", ["test_shared", "test_shared_file"])
def test_shared_memory_is_live_memory(functions: dict[str, Record], test: str) -> None:
    assert _read(functions[test], "held_live_bytes") == pytest.approx(64 * MIB, rel=0.01)
    assert _read(functions[test], "peak_live_bytes") == pytest.approx(2 * 64 * MIB, rel=0.01)  # what is written, too


def test_a_child_does_not_make_free_memory_of_its_parent_live(functions: dict[str, Record]) -> None:
    alone, beside = functions["test_holes[False]"], functions["test_holes[True]"]
    how = beside.obtained["peak_live_bytes"]
    assert how["children"]
    child = _read(beside, "children_peak_bytes")
    assert _read(beside, "peak_live_bytes") <= how["at_most_bytes"]
    assert _read(beside, "peak_live_bytes") <= _read(alone, "peak_live_bytes") + child + MIB


def test_holes_in_the_heap_of_a_thread_are_not_held(functions: dict[str, Record]) -> None:
    # 3,033 bytes in blocks of 3,056, and 8 in the list; as much lies between them
    record = functions["test_holes_of_a_thread"]
    assert _read(record, "held_live_bytes") == pytest.approx(4000 * 3064, rel=0.03)


def test_a_function_that_closes_standard_error_is_measured(functions: dict[str, Record]) -> None:
    assert _read(functions["test_closed"], "held_live_bytes") == pytest.approx(0, abs=MIB)


def test_garbage_in_cycles_does_not_add_up_over_steps(functions: dict[str, Record]) -> None:
    record = functions["test_cycles"]
    assert _read(record, "peak_live_bytes") == pytest.approx(32 * MIB, rel=0.02)
    (note,) = record.notes
    assert note.startswith("a step leaves 32.0")
    assert not functions["test_read"].notes


def test_the_footprint_of_a_process_that_was_pinned_is_an_estimate(functions: dict[str, Record]) -> None:
    how = functions["test_read"].obtained["peak_footprint_bytes"]
    assert how["bound"] == "about"
    assert how["off_bytes"] == _read(functions["test_read"], "peak_footprint_bytes") // 3 + 7 * MIB
    assert "pinned before" in how["source"]


_MODEL = """\
import torch
from torch import nn


class Many(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.small = nn.ParameterList([nn.Parameter(torch.ones(2048)) for _ in range(count)])
        self.embed = nn.Embedding(256, 32)
        self.head = nn.Linear(32, 256, bias=False)

    def forward(self, ids):
        return self.head(self.embed(ids))


def many():
    return Many(4096)
"""

_PLUGINS = """\
from membench.plugins import Technique


class Idle(Technique):
    \"\"\"Does nothing.\"\"\"

    acts_on = "weights"

    def apply(self, module, context):
        return module


class Twice(Idle):
    \"\"\"Does nothing either.\"\"\"


class Halved(Technique):
    \"\"\"Keeps each weight in half the bytes.\"\"\"

    acts_on = "weights"

    def apply(self, module, context):
        return module.half()
"""

_SUITE = """\
[suite]
name = "small-tensors"
[matrix]
model = ["many"]
technique = ["none", "idle", "halved", "idle+twice"]
workload = ["forward"]
[model.many]
use = "factory"
function = "model:many"
[settings]
threads = 1
measured_steps = 1
evaluate_s = 0
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """The records of a model whose weights lie in 4,096 tensors of 8 KiB, by technique."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "membench_plugins.py").write_text(_PLUGINS)
    (folder / "model.py").write_text(_MODEL)
    (folder / "suite.toml").write_text(_SUITE)
    with contextlib.chdir(folder):
        run = membench.run(membench.load_suite("suite.toml"))
    assert {record.status for record in run.records} == {"ok"}, [record.message for record in run.records]
    return {record.technique: record for record in run.records}


def test_no_phase_of_a_technique_that_does_nothing_holds_anything_of_the_harness(cases: dict[str, Record]) -> None:
    for technique in ("idle", "idle+twice"):
        phases, plain = ({p.name: p for p in cases[name].processes[0].phases} for name in (technique, "none"))
        for name in ("load", "apply", "warmup", "run"):
            for field in ("peak_live_bytes", "held_live_bytes"):
                value, of = getattr(phases[name], field), getattr(plain[name], field)
                assert value == pytest.approx(of, rel=0.01), (technique, name, field)
    apply = next(p for p in cases["none"].processes[0].phases if p.name == "apply")
    load = next(p for p in cases["none"].processes[0].phases if p.name == "load")
    # torch keeps an object of some 130 bytes for each storage whose size is asked for.
    assert apply.held_live_bytes == pytest.approx(load.held_live_bytes or 0, rel=0.02)
    assert not cases["idle"].notes


def test_many_small_tensors_in_half_the_bytes_are_half_the_live_memory(cases: dict[str, Record]) -> None:
    plain, halved = (
        next(phase.held_live_bytes for phase in cases[name].processes[0].phases if phase.name == "apply")
        for name in ("none", "halved")
    )
    assert plain is not None
    assert halved is not None
    assert plain - halved == pytest.approx(16 * MIB, rel=0.02)
    # torch makes an object of some 130 bytes for a storage whose size is asked for, in steps also for the new ones.
    saved = _read(cases["none"], "held_live_bytes") - _read(cases["halved"], "held_live_bytes")
    assert 15 * MIB < saved < 16.5 * MIB
    assert _read(cases["none"], "peak_live_bytes") - _read(cases["halved"], "peak_live_bytes") == pytest.approx(
        16 * MIB, rel=0.05
    )


def test_free_memory_between_small_blocks_makes_a_peak_an_estimate_with_its_bounds(cases: dict[str, Record]) -> None:
    how = cases["halved"].obtained["peak_live_bytes"]
    assert how["bound"] == "about"
    assert how["at_least_bytes"] <= _read(cases["halved"], "peak_live_bytes") < how["at_most_bytes"]


def test_a_mebibyte_more_of_a_hundred_can_be_told(tmp_path: Path) -> None:
    suite = membench.Suite(
        "hundred",
        matrix={"model": ["hundred", "more"], "technique": ["none"], "workload": ["still"]},
        model={"hundred": {"use": "ballast", "mib": 100}, "more": {"use": "ballast", "mib": 101}},
        workload={"still": {"use": "burst", "mib": 0}},
        settings={"measured_steps": 1, "threads": 1},
    )
    first, second = membench.run(suite, output=tmp_path).records
    assert _read(second, "held_live_bytes") - _read(first, "held_live_bytes") == pytest.approx(MIB, rel=0.1)
    assert first.obtained["held_live_bytes"]["resolution_bytes"] < MIB / 10


assert hasattr(mmap, "MAP_POPULATE"), "the functions above need it"
