"""Compiled kernels: no case uses the user's caches, and a broken one of membench's own is compiled anew."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import membench
from membench.host.cache import cache_folder
from membench.protocol.case import Plugin
from membench.protocol.requests import MeasureCase, ReferenceLogits, Steps
from membench.records.record import Record
from membench.worker import kernels
from membench.worker.kernels import Kernels, kept_kernels

_LIBRARY = b"\x7fELF" + bytes(range(256)) * 64

_PLUGINS = """\
import os
from pathlib import Path

from membench.plugins import Technique


class Compiles(Technique):
    '''Has a compiler that trusts what it finds, as torch's does: it reads a library, or else makes it.'''

    def apply(self, module, context):
        name = "rehearsed.so" if context.rehearsal else "own.so"
        library = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "ab" / name
        if library.exists() and not library.read_bytes().startswith(b"library"):
            raise ImportError(f"{library}: file too short")
        library.parent.mkdir(parents=True, exist_ok=True)
        made = "found" if library.exists() else "made"
        library.write_bytes(b"library" * 100)
        with open(os.environ["COMPILED"], "a") as log:
            print(f"{library.name} {made}", file=log)
        return module


TECHNIQUES = {"compiles": Compiles}
"""

_SUITE = """\
[suite]
name = "kernels"
plugins = ["plugins_here.py"]
[matrix]
model = ["small"]
technique = ["TECHNIQUE"]
workload = ["short"]
[model.small]
use = "factory"
function = "small_model:make"
[workload.short]
use = "forward"
batch_size = 1
sequence_length = 8
[settings]
measured_steps = 1
evaluate_s = 0
"""

_MODEL = """\
import torch

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256)

    def forward(self, ids):
        return self.head(torch.sin(self.table(ids)) * 2)

def make():
    return Small()
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "users"))


def _request(technique: str = "adamw-8bit") -> MeasureCase:
    model, workload = Plugin("llama", {"size": "15m"}), Plugin("train", {})
    steps = Steps(warmup=1, measured=1)
    return MeasureCase(model, [Plugin(technique, {})], [technique], workload, 0, steps, ReferenceLogits("x", False))


def _kernels(scratch: Path, technique: str = "adamw-8bit") -> Kernels:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return Kernels(_request(technique), "cpu", scratch)


def _without_error() -> None:
    return None


def _compile(name: str, content: bytes = _LIBRARY) -> Path:
    path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_rehearsals_libraries_come_back_to_the_byte_and_those_of_other_cases_and_compilers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _kernels(tmp_path / "first")
    _compile("ab/whole.main.so")
    _compile("ab/emptied.main.so", b"")
    _compile("fxgraph/graph", b"what torch finds out is not kept")
    first.used_by(_without_error)
    again = _kernels(tmp_path / "again")
    (found,) = (path for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert (found.name, found.read_bytes(), again.count()) == ("whole.main.so", _LIBRARY, 1)
    assert _kernels(tmp_path / "other", "adamw-4bit").count() == 0
    monkeypatch.setenv("CXX", shutil.which("true") or "true")
    assert _kernels(tmp_path / "compiler").count() == 0
    assert not (tmp_path / "users").exists()


def _empty(archive: bytes) -> bytes:
    return archive[:0]


def _cut_off(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def _overwrite(archive: bytes) -> bytes:
    at = len(archive) // 3
    return archive[:at] + bytes(8) + archive[at + 8 :]


def _garbage(archive: bytes) -> bytes:
    return b"\x80\x04garbage" * (len(archive) // 9)


@pytest.mark.parametrize("damage", [_empty, _cut_off, _overwrite, _garbage])
def test_a_damaged_archive_is_thrown_away_and_said(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    first = _kernels(tmp_path / "first")
    _compile("ab/whole.main.so", os.urandom(4096))
    first.used_by(_without_error)
    (archive,) = kept_kernels().iterdir()
    archive.write_bytes(damage(archive.read_bytes()))
    again = _kernels(tmp_path / "again")
    assert again.count() == 0
    assert not archive.exists()
    assert again.notes == [
        "compiled kernels were thrown away, and compiled anew: their archive in membench's cache was damaged"
    ]


def test_old_unfinished_and_too_many_archives_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MOST_BYTES", 2500)
    now_s, day_s = time.time(), 86400
    ages_s = {"newest.zip": 0, "older.zip": 1, "oldest.zip": 2, "writing-now": 0.5, "writing-killed": 2 * 3600,
              "unused.zip": 61 * day_s}  # fmt: skip
    for name, age_s in ages_s.items():
        (tmp_path / name).write_bytes(bytes(10 if name.startswith(("writing", "unused")) else 1000))
        os.utime(tmp_path / name, (now_s - age_s, now_s - age_s))
    kernels.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"newest.zip", "older.zip", "writing-now"}


def test_a_cache_that_cannot_be_written_ends_no_case(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = _kernels(tmp_path / "first")
    _compile("ab/whole.main.so")
    first.used_by(_without_error)
    assert first.notes == []


def _run(folder: Path, technique: str) -> Record:
    (folder / "small_model.py").write_text(_MODEL)
    (folder / "plugins_here.py").write_text(_PLUGINS)
    (folder / "kernels.toml").write_text(_SUITE.replace("TECHNIQUE", technique))
    run = membench.run(membench.load_suite(folder / "kernels.toml"), output=folder / "results")
    record = run.records[-1]  # the reference comes first
    assert (record.technique, record.status) == (technique, "ok"), record.message
    return record


def test_a_broken_library_is_found_by_the_rehearsal_and_measured_steps_always_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "compiled"
    monkeypatch.setenv("COMPILED", str(log))
    assert _run(tmp_path, "compiles").notes == ()
    assert _run(tmp_path, "compiles").notes == ()
    assert log.read_text().split() == [
        "rehearsed.so",
        "made",
        "own.so",
        "made",
        "rehearsed.so",
        "found",
        "own.so",
        "made",
    ]

    with pytest.MonkeyPatch.context() as patch:  # an archive that is whole, with a library that is not
        patch.setattr(kernels, "_fingerprint", lambda *_: next(kept_kernels().iterdir()).stem)
        broken = _kernels(tmp_path / "broken")
        (tmp_path / "broken" / "kernels" / "inductor" / "ab" / "rehearsed.so").write_bytes(b"\x7fELF")
        _compile("ab/another.so")
        broken.used_by(_without_error)
    (note,) = _run(tmp_path, "compiles").notes
    assert note.startswith("compiled kernels were thrown away, and compiled anew: the rehearsal with them failed (")
    assert log.read_text().splitlines()[4:] == ["rehearsed.so made", "own.so made"]


def test_torchs_compiler_leaves_the_users_cache_alone_and_says_what_the_first_step_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = _run(tmp_path, "compile")
    assert not any(path.is_file() for path in (tmp_path / "users").rglob("*"))
    assert [path.suffix for path in (cache_folder() / "kernels").iterdir()] == [".zip"]
    assert any(
        note.startswith("the first step compiled kernels, none of them from a cache (libraries: ")
        for note in record.notes
    )
