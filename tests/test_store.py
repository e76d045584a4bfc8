"""A run's file: what is written is read again, whatever happens to writer, disk or file."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import membench
from membench.errors import ResultsError
from membench.protocol.readings import ProcessReading
from membench.records.record import SCHEMA_VERSION, Record
from membench.records.run_file import KeptElsewhere, RunFile, find_run, newest_run, read_run

_PROCESS = ProcessReading(role="worker", rank=0, device="cpu", phases=[])


def _record(technique: str, output_tail: str = "") -> Record:
    case = {"model": "m", "technique": technique, "workload": "w", "device": "cpu"}
    return Record(
        case=case, id=f"m/{technique}/w/cpu", repeat=0, status="ok", ended_in=None, message=None, started_at="",
        duration_s=1.0, metrics={"weights_bytes": 1}, reasons={}, obtained={}, processes=(_PROCESS,),
        remarks=("r",), notes=("n",), broken_limits=(), timeline={"at_s": [0.5]}, output_tail=output_tail, machine={},
        settings={},
    )  # fmt: skip


def _header(suite: str = "s", **more: Any) -> dict[str, Any]:
    return {"run": f"{suite}-1", "suite": suite, **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run of two records."""
    path = tmp_path / "results" / "s-1.jsonl"
    with RunFile.create(path, _header()) as file:
        file.append(_record("none"))
        file.append(_record("bf16"))
    return path


def test_what_was_written_is_read_again(path: Path) -> None:
    run = membench.read_run(path)
    assert run.header == {"schema": SCHEMA_VERSION, **_header()}
    assert run.records == (_record("none"), _record("bf16"))


def test_a_half_written_last_line_is_passed_over_and_cut_off_before_more_is_written(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"schema":1,"case":{"mod')
    assert [record.technique for record in read_run(path).records] == ["none", "bf16"]
    with RunFile.reopen(path) as file:
        assert path.read_bytes() == whole
        file.append(_record("fp16"))
    assert [record.technique for record in read_run(path).records] == ["none", "bf16", "fp16"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{nonsense}", "line 3: not JSON"),
        (b"\xff\xfe", "line 3: not JSON"),
        (b'{"case": 1}', "line 3: no membench record ('schema' is missing)"),
        (b'{"schema": 99}', f"line 3: schema 99 is newer than {SCHEMA_VERSION}"),
        (b'{"schema": 1}', "line 3: 'case' is missing"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(path: Path, line: bytes, message: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line + b"\n"]))
    with pytest.raises(ResultsError) as raised:
        read_run(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)


def test_a_file_without_a_header_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for content in (b"", b'{"schema": 1}\n'):
        path.write_bytes(content)
        with pytest.raises(ResultsError, match="not the results of a run"):
            read_run(path)
    with pytest.raises(ResultsError, match="cannot be read: No such file"):
        read_run(tmp_path / "absent.jsonl")


@contextlib.contextmanager
def no_file_above_4_kib() -> Iterator[None]:
    """Stands in for a full disk: a write ends in the middle of a line. Held no longer than the write: pytest's own
    output may be a file, and larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_that_does_not_fit_costs_none_of_those_before(path: Path) -> None:
    whole = path.read_bytes()
    with RunFile.reopen(path) as file, pytest.raises(ResultsError) as raised, no_file_above_4_kib():
        file.append(_record("large", "x" * 8192))
    assert str(raised.value) == (
        f"{path}: cannot be written: File too large; what was finished before is kept, without this record:"
        f" no copy in {tempfile.gettempdir()}: File too large"
    )
    assert path.read_bytes() == whole


def _removed(path: Path) -> Path | None:
    shutil.rmtree(path.parent)
    return None


def _replaced(path: Path) -> Path | None:
    path.unlink()
    path.write_text("another file")
    return None


def _replaced_by_a_file(path: Path) -> Path | None:
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder")
    return None


def _moved(path: Path) -> Path | None:
    return path.parent.rename(path.parent.parent / "elsewhere") / path.name


@pytest.mark.parametrize("change", [_removed, _replaced, _replaced_by_a_file, _moved])
def test_of_a_file_that_vanishes_all_records_are_kept_at_a_place_that_is_named(
    path: Path, change: Callable[[Path], Path | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RunFile.reopen(path) as file:
        file.check()
        moved_to = change(path)
        with pytest.raises(KeptElsewhere) as raised:
            file.append(_record("fp16"))
        elsewhere = raised.value.path
        assert elsewhere is not None
        assert str(elsewhere) in str(raised.value)
        assert moved_to in (elsewhere, None)
        assert [record.technique for record in read_run(elsewhere).records] == ["none", "bf16", "fp16"]
        with pytest.raises(KeptElsewhere):
            file.check()


def test_a_header_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with pytest.raises(ResultsError, match=r"cannot be written: File too large$"), no_file_above_4_kib():
        RunFile.create(path, _header(suite_text="x" * 8192))
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"file/folder: no folder for results: Not a directory"):
        RunFile.create(tmp_path / "file" / "folder" / "s-1.jsonl", _header())


def test_a_file_that_is_being_written_is_refused_to_a_second_runner(path: Path) -> None:
    with RunFile.reopen(path), pytest.raises(ResultsError, match="another run is writing to it"):
        RunFile.reopen(path)
    with RunFile.reopen(path) as file:
        file.append(_record("fp16"))
    assert len(read_run(path).records) == 3


def _written(folder: Path, name: str, header: dict[str, Any], at_s: int) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text(json.dumps({"schema": 1, **header}) + "\n")
    os.utime(path, (at_s, at_s))
    return path


def test_the_newest_run_of_a_suite_is_found_by_its_header_and_not_by_its_name(tmp_path: Path) -> None:
    old = _written(tmp_path, "a-1", _header("a", started_at="2026-01-01"), 1)
    new = _written(tmp_path, "renamed", _header("a", started_at="2026-01-03"), 3)
    other = _written(tmp_path, "a-b-1", _header("a-b", started_at="2026-01-04"), 4)
    _written(tmp_path, "a-9", {"nothing": "of ours"}, 9)
    assert find_run(tmp_path, "a") == new
    assert find_run(tmp_path, "a-b") == other
    assert find_run(tmp_path, "b") is None
    assert find_run(tmp_path, "a", since="2026-01-04") is None
    assert newest_run(tmp_path) == other
    new.unlink()
    assert find_run(tmp_path, "a") == old


def test_an_empty_folder_says_how_to_get_a_run(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no run there; 'membench run quickstart' makes one"):
        newest_run(tmp_path)
