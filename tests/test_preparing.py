"""Loaders write their files without the model in memory, or refuse the case before they begin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from membench import plugins
from membench.builtin.models.factory import Factory
from membench.builtin.techniques import loading, mapped_checkpoint
from membench.builtin.techniques.loading import MemoryMapped, MetaInit, PlainLoad, Saved, Streamed
from membench.builtin.techniques.quantization import Int8WeightOnly
from membench.builtin.workloads.forward import Forward
from membench.host import procfs
from membench.plugins import DoesNotFit, NotInModel, Technique, Unsuitable
from membench.worker import fitting
from membench.worker.assembly import Assembly
from membench.worker.child_process import run_in_child
from tests.training import context

_MIB = 2**20
_WEIGHTS_BYTES = 2 * 256 * 64 * 4 + 256 * 4
_MODEL = Factory.model_validate({"function": "tests.test_preparing:small"})

_PREPARE = """\
import resource, sys
from contextlib import nullcontext
from pathlib import Path

import torch

from membench import plugins
from membench.builtin.models.factory import Factory
from membench.builtin.techniques.loading import MemoryMapped

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 2048)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(20)))
        self.register_buffer("angles", torch.arange(2048 * 2048.0).view(2048, 2048))
        self.other = torch.nn.Linear(2048, 2048)
        self.other.weight = self.layers[0].weight
        elsewhere = torch.empty(2048, 2048)
        self.late = torch.nn.Parameter(elsewhere)
        elsewhere.fill_(3)

folder, limit_mib, kind = Path(sys.argv[1]), int(sys.argv[2]), getattr(resource, sys.argv[3])
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
there_bytes = int(status["VmData"].split()[0]) * 1024 if kind == resource.RLIMIT_DATA else 0
resource.setrlimit(kind, (there_bytes + limit_mib * 2**20,) * 2)
torch.set_num_threads(1)
torch.manual_seed(0)
if sys.argv[4] == "plain":
    Tower()
else:
    model = Factory(function="x:y")
    context = plugins.Context("cpu", 0, model, nullcontext, {}, folder)
    MemoryMapped().prepare(Tower, context)
"""


def small() -> Any:
    """Return a model of two matrices of 256 × 64, and a bias."""
    from torch import nn

    return nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256))


def _prepare(folder: Path, limit_mib: int, kind: str, how: str = "prepare") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PREPARE, str(folder), str(limit_mib), kind, how]
    # Else malloc keeps the room of tensors that have moved to the file, untouched, and the limit counts it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_model_of_360_mib_is_written_with_64_mib_of_memory_and_no_more_on_disk_than_it_has(tmp_path: Path) -> None:
    import torch

    assert "can't allocate memory" in _prepare(tmp_path, 64, "RLIMIT_DATA", "plain").stderr
    done = _prepare(tmp_path, 64, "RLIMIT_DATA")
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.iterdir()
    layer_bytes = 2048 * 2048 * 4
    held_bytes = 22 * layer_bytes + 256 * 2048 * 4
    # The weight that is then tied to another is given back; biases and the index are small.
    assert held_bytes < file.stat().st_blocks * 512 < held_bytes + 2 * _MIB
    checkpoint = mapped_checkpoint.MappedCheckpoint(file)
    torch.manual_seed(0)
    table, first = torch.nn.Embedding(256, 2048), torch.nn.Linear(2048, 2048)
    assert torch.equal(checkpoint.mapped("table.weight"), table.weight)
    assert torch.equal(checkpoint.mapped("layers.0.weight"), first.weight)
    assert torch.equal(checkpoint.mapped("layers.0.bias"), first.bias)
    assert torch.equal(checkpoint.mapped("angles").view(-1), torch.arange(2048 * 2048.0))
    assert (checkpoint.mapped("late") == 3).all()  # written through a tensor that shares its memory


def test_a_disk_that_fills_up_is_said_in_one_line_and_kills_nothing(tmp_path: Path) -> None:
    done = _prepare(tmp_path, 100, "RLIMIT_FSIZE")
    assert done.returncode == 1
    assert "Unsuitable: the checkpoint has no room in " in done.stderr.splitlines()[-1]


def _case(folder: Path, *stack: Technique) -> Assembly:
    names = tuple(type(technique).__name__ for technique in stack)
    made = plugins.Context("cpu", 0, _MODEL, context(_MODEL).part, {}, folder)
    return Assembly(_MODEL, stack, Forward.model_validate({}), names, made)


@pytest.mark.parametrize(
    ("stack", "shares"),
    [
        ([PlainLoad()], 2),
        ([MetaInit()], 1),
        ([Streamed()], 1),
        ([MemoryMapped()], 0),
        ([Streamed(), Int8WeightOnly.model_validate({})], 0.25),
        ([Saved()], None),
    ],
    ids=lambda value: "+".join(type(one).__name__ for one in value) if isinstance(value, list) else None,
)
def test_a_loader_that_needs_more_than_there_is_is_refused_before_anything_is_written(
    stack: list[Technique], shares: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _MODEL.skeleton()  # so that each process need not import what that takes
    case = _case(tmp_path, *stack)
    least_bytes = int((shares or 0) * _WEIGHTS_BYTES)
    monkeypatch.setattr(fitting, "available_bytes", lambda: least_bytes - 1)
    if shares:
        with pytest.raises(DoesNotFit, match=r"^loading needs .*iB; .*iB are available on this machine$"):
            case.prepare()
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fitting, "available_bytes", lambda: least_bytes)
    case.prepare()
    assert any(path.name.startswith("loaded.") for path in tmp_path.iterdir())


def test_ranks_on_the_cores_of_one_machine_load_the_model_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "available_bytes", lambda: 3 * _WEIGHTS_BYTES)
    fitting.refuse_what_cannot_load(_MODEL, [MetaInit()], "cpu", 3)
    with pytest.raises(DoesNotFit, match=r"^loading needs 516.0 KiB; 387.0 KiB are available on this machine$"):
        fitting.refuse_what_cannot_load(_MODEL, [MetaInit()], "cpu", 4)


def test_ranks_that_prepare_at_the_same_time_need_room_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _MODEL.skeleton()
    case = _case(tmp_path, MetaInit())
    monkeypatch.setattr(fitting, "available_bytes", lambda: 2 * _WEIGHTS_BYTES)
    with pytest.raises(DoesNotFit, match=r"^loading needs 387.0 KiB; 258.0 KiB are available on this machine$"):
        case.prepare(3)
    assert list(tmp_path.iterdir()) == []
    case.prepare(2)
    assert any(path.name.startswith("loaded.") for path in tmp_path.iterdir())


def test_a_stack_that_is_converted_in_memory_is_refused_before_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_bytes", lambda: _WEIGHTS_BYTES - 1)
    with pytest.raises(DoesNotFit, match=r"^building the model to convert it needs 129.0 KiB; "):
        Saved().prepare(lambda: pytest.fail("it was built"), _case(tmp_path, Saved()).context)


def test_a_folder_in_memory_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory, on_disk = Path("/dev/shm"), Path("/proc/self/cwd")
    if not in_memory.is_dir():
        pytest.skip("there is no /dev/shm here")
    assert procfs.is_in_memory(in_memory)
    monkeypatch.setattr(mapped_checkpoint, "available_bytes", lambda: 5 * _MIB)
    mapped_checkpoint.needs_room(5 * _MIB, in_memory)
    with pytest.raises(
        DoesNotFit, match=r"^the checkpoint in /dev/shm, which is in memory, needs 6.000 MiB; 5.000 MiB"
    ):
        mapped_checkpoint.needs_room(6 * _MIB, in_memory)
    assert not procfs.is_in_memory(on_disk.resolve()) or procfs.is_in_memory(Path("/"))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (lambda: DoesNotFit("needs more"), DoesNotFit, "^needs more$"),
        (lambda: Unsuitable("not this"), Unsuitable, "^not this$"),
        (lambda: NotInModel("no such layer"), NotInModel, "^no such layer$"),
        (lambda: MemoryError("no more"), MemoryError, "^MemoryError: no more$"),
        (lambda: ValueError("wrong"), RuntimeError, "^ValueError: wrong$"),
    ],
)
def test_what_ends_preparing_ends_the_case_as_it_is(
    raised: Callable[[], Exception], kind: type[Exception], message: str
) -> None:
    def work() -> dict[str, list[Any]]:
        raise raised()

    with pytest.raises(kind, match=message):
        run_in_child(work)


def test_preparing_that_is_killed_but_not_for_memory_is_no_lack_of_memory() -> None:
    def work() -> dict[str, list[Any]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(RuntimeError, match=r"^the process that prepared the case was killed by signal 9$"):
        run_in_child(work)
