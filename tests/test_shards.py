"""Shards: the same batches however they are kept, and nothing from files that are not as they were written."""

from __future__ import annotations

import itertools
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from membench.data import codecs
from membench.data.dataset import Dataset
from membench.data.epochs import epochs
from membench.data.layouts import Integers
from membench.data.shards import Shards
from membench.plugins.storage import Codec, Damaged, Extent, Storage

_LENGTH, _ROWS, _FRAME_ROWS = 32, 1000, 64
_KINDS: dict[str, Callable[[], Codec | None]] = {
    "no codec": lambda: None,
    "lzw": codecs.Lzw,
    "lzma": lambda: codecs.Lzma(1),
    "zstd": lambda: codecs.Zstd(1, None),
    "zstd with a dictionary": lambda: codecs.Zstd(1, 2048),
    "gzip": lambda: codecs.Gzip(1),
    "bz2": lambda: codecs.Bz2(1),
    "lz4": lambda: codecs.Lz4(0),
    "brotli": lambda: codecs.Brotli(1),
}


def _rows(count: int = _ROWS) -> Any:
    """Rows that differ from each other and can be compressed."""
    import numpy

    return numpy.arange(count * _LENGTH).reshape(count, _LENGTH) // 7 % 251


def _storage(kind: str, reading: Any = "stream", layout: str = "uint8") -> Storage:
    return Storage(Shards(), Integers(layout), _KINDS[kind](), reading, _FRAME_ROWS * _LENGTH)


def _written(folder: Path, kind: str, reading: Any = "stream", layout: str = "uint8", count: int = _ROWS) -> Dataset:
    return Dataset.written(_rows(count), _storage(kind, reading, layout), 256, folder)


def _epoch(data: Dataset, number: int = 0, workers: int = 0) -> list[Any]:
    return [batch.numpy() for batch in epochs(data, 24, 0, workers)(number)]


_MANY_ROWS = 70_001
"""Rows of three windows; the last one's frames and batches are not full."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The batches of an epoch of rows of 64 bits that are all in memory."""
    return _epoch(_written(tmp_path_factory.mktemp("plain") / "data", "no codec", "whole", "int64", _MANY_ROWS))


def _sorted(batches: list[Any]) -> Any:
    import numpy

    rows = numpy.concatenate(batches)
    return rows[numpy.lexsort(rows.T)]


def test_an_epoch_has_each_row_once(plain: list[Any]) -> None:
    import numpy

    assert numpy.array_equal(_sorted(plain), _sorted([_rows(_MANY_ROWS)]))
    assert [len(batch) for batch in plain] == [24] * (_MANY_ROWS // 24) + [_MANY_ROWS % 24]
    assert not numpy.array_equal(numpy.concatenate(plain), _rows(_MANY_ROWS))


@pytest.mark.parametrize("kind", _KINDS)
def test_batches_have_the_same_ids_however_they_are_compressed(kind: str, plain: list[Any], tmp_path: Path) -> None:
    import numpy

    data = _written(tmp_path / "data", kind, count=_MANY_ROWS)
    for read in (data, Dataset(data.folder, replace(data.storage, reading="whole"), data.extent)):
        found = _epoch(read)
        assert {batch.dtype for batch in found} == {numpy.dtype("uint8")}
        assert all(numpy.array_equal(batch, theirs) for batch, theirs in zip(found, plain, strict=True))
    assert not numpy.array_equal(numpy.concatenate(_epoch(data, 1)), numpy.concatenate(plain))


def test_processes_share_an_epoch_out_among_them(plain: list[Any], tmp_path: Path) -> None:
    import numpy

    data = _written(tmp_path / "data", "zstd with a dictionary", count=_MANY_ROWS)
    assert numpy.array_equal(_sorted(_epoch(data, workers=2)), _sorted(plain))


def _frame_at(data: Dataset, file: str, place: int) -> tuple[int, int]:
    """The frame that a byte of a file belongs to, and its offset."""
    if file[:6].isdecimal():
        return int(file[:6]), 0
    ends = itertools.accumulate(size for size, _ in json.loads((data.folder / "index.json").read_text())["frames"])
    number, (offset, _) = next(
        (number, (start, end)) for number, (start, end) in enumerate(itertools.pairwise([0, *ends])) if place < end
    )
    return number, offset


@pytest.mark.parametrize("kind", _KINDS)
def test_a_flipped_bit_is_named_with_file_and_offset_and_its_frame_gives_no_rows(kind: str, tmp_path: Path) -> None:
    data = _written(tmp_path / "data", kind)
    files = [path for path in sorted(data.folder.iterdir()) if path.suffix in (".bin", f".{_ending(kind)}")]
    for path in (files[0], files[-1]):
        whole = path.read_bytes()
        for place in range(0, len(whole), -(-len(whole) // 25)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            number, offset = _frame_at(data, path.name, place)
            read = data.storage.format.open(data.extent, data.storage, data.folder)
            for numbers in (range(number, number + 1), range(max(0, number - 2), min(16, number + 2))):
                with pytest.raises(Damaged, match=rf"^{path}, offset {offset}: "):
                    read(numbers)
            with pytest.raises(Damaged, match=rf"^{path}, offset {offset}: "):
                _epoch(data)
        path.write_bytes(whole)
    assert len(_epoch(data)) == -(-_ROWS // 24)


def _ending(kind: str) -> str:
    codec = _KINDS[kind]()
    return codec.ending if codec else "bin"


@pytest.mark.parametrize("reading", ["whole", "stream"])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_shard_that_was_cut_is_named_with_file_and_offset_before_anything_is_read(
    kind: str, reading: str, tmp_path: Path
) -> None:
    data = _written(tmp_path / "data", kind, reading)
    path = sorted(data.folder.glob(f"*.{_ending(kind)}"))[-1]
    whole = path.read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        _, offset = _frame_at(data, path.name, kept)
        with pytest.raises(Damaged, match=rf"^{path}, offset {offset}: .* the file ends at {kept}$"):
            data.opened()
    path.unlink()
    with pytest.raises(Damaged, match=rf"^{path}, offset 0: "):
        data.opened()


def test_a_shard_that_is_cut_while_it_is_read_gives_no_rows(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", "zstd")
    read, path = data.storage.format.open(data.extent, data.storage, data.folder), tmp_path / "data" / "frames.zst"
    assert len(read(range(15, 16))) == _ROWS - 15 * _FRAME_ROWS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    _, offset = _frame_at(data, path.name, len(whole) - 1)
    for first in (15, 13):
        with pytest.raises(Damaged, match=rf"^{path}, offset {offset}: "):
            read(range(first, 16))


@pytest.mark.parametrize("rows", [_FRAME_ROWS - 1, _FRAME_ROWS + 1, 1000 * _FRAME_ROWS])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_frame_that_holds_other_than_its_rows_gives_none(kind: str, rows: int, tmp_path: Path) -> None:
    """The checksum is right: it was written so."""
    storage = _storage(kind)
    frames = [_rows(count) for count in (_FRAME_ROWS, _FRAME_ROWS, rows, *[_FRAME_ROWS] * 12, 8)]
    extent = Extent(15 * _FRAME_ROWS + 8, _LENGTH, 256)
    storage.format.write(frames, extent, storage, tmp_path / "data")
    read = storage.format.open(extent, storage, tmp_path / "data")
    assert read(range(1, 2)).tolist() == _rows(_FRAME_ROWS).tolist()
    assert read(range(14, 16)).tolist() == [*_rows(_FRAME_ROWS).tolist(), *_rows(8).tolist()]
    with pytest.raises(Damaged, match=rf"^{tmp_path}/data/(frames|000002)\.\w+, offset \d+: ") as alone:
        read(range(2, 3))
    with pytest.raises(Damaged) as among_others:
        read(range(16))
    assert str(among_others.value) == str(alone.value)


_OF_NO_INDEX = {
    "a list": [],
    "no frames": {"frames": None},
    "words for numbers": {"frames": [["9", "9"]]},
    "fractions": {"frames": [[9.5, 9]]},
    "a size below zero": {"frames": [[-9, 9]]},
    "three values for two": {"frames": [[9, 9, 9]]},
    "an unknown key": {"../": "../"},
    "a head below zero": {"head_bytes": -1},
    "true for a number": {"version": True},
    "one frame too few": {"drop": 1},
    "a frame twice": {"twice": 1},
    "two frames exchanged": {"exchange": 1},
    "a frame of a terabyte": {"frames": [[2**40, 9]] * 16},
    "a number beyond 64 bits": {"frames": [[10**30, 9]] * 16},
    "an empty frame": {"frames": [[0, 0]] * 16},
    "a head": {"head_bytes": 1},
    "a foot": {"foot_bytes": 1},
    "another checksum": {"head_and_foot_checksum": 1},
    "frames of another size": {"frame_rows": 63},
    "fewer rows": {"extent": [999, _LENGTH, 256]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["no codec", "lzw", "zstd"])
@pytest.mark.parametrize("change", _OF_NO_INDEX)
def test_an_index_of_anything_else_is_named(change: str, kind: str, tmp_path: Path) -> None:
    data = _written(tmp_path / "data", kind)
    path = data.folder / "index.json"
    index, changed = json.loads(path.read_text()), _OF_NO_INDEX[change]
    frames = index["frames"]
    match changed:
        case {"drop": place}:
            del frames[place]
        case {"twice": place}:
            frames.insert(place, frames[place])
        case {"exchange": place}:
            frames[place : place + 2] = frames[place : place + 2][::-1]
        case dict():
            index |= changed
        case list():
            index = changed
    path.write_text(json.dumps(index))
    with pytest.raises(Damaged, match=f"^{data.folder}/"):
        _epoch(data)


@pytest.mark.parametrize("kind", ["lzw", "zstd"])
def test_files_that_are_exchanged_or_go_on_are_named(kind: str, tmp_path: Path) -> None:
    data = _written(tmp_path / "data", kind)
    path = sorted(data.folder.glob(f"*.{_ending(kind)}"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(Damaged, match=rf"^{path}, offset {len(whole)}: 0 bytes should be here"):
        data.opened()
    path.write_bytes(whole)
    if kind == "lzw":
        path.rename(tmp_path / "aside")
        (data.folder / "000001.Z").rename(path)
        (tmp_path / "aside").rename(data.folder / "000001.Z")
        with pytest.raises(Damaged, match=rf"^{data.folder}/00000[01].Z, offset 0: "):
            _epoch(data)


def test_rows_of_frames_of_another_size_are_not_taken_for_those_that_are_wanted(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", "no codec")
    other = replace(data, storage=replace(data.storage, frame_tokens=32 * _LENGTH))
    with pytest.raises(Damaged, match=r"what is here is .*frame_rows 64, and .*frame_rows 32 is to be read"):
        other.opened()


def test_an_index_that_is_cut_or_gone_or_of_other_data_is_named(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", "zstd")
    path = data.folder / "index.json"
    whole = path.read_text()
    for kept in range(len(whole)):
        path.write_text(whole[:kept])
        with pytest.raises(Damaged, match=rf"^{path}: "):
            data.opened()
    for old, new in (('"zstd"', '"gzip"'), ('"uint8"', '"uint16"'), ('"version":3', '"version":2'), ("1000", "1001")):
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(Damaged, match=rf"^{path}: what is here is "):
            data.opened()
    path.write_text(whole.replace('"version":3', '"version":2').replace("_checksum", "_crc32"))
    with pytest.raises(Damaged, match=rf"^{path}: what is here is of version 2, and 3 is to be read"):
        data.opened()
    path.write_text("[" * 100_000)
    with pytest.raises(Damaged, match=rf"^{path}: "):
        data.opened()
    path.unlink()
    with pytest.raises(Damaged, match=rf"^{data.folder}: "):
        data.opened()
    path.mkdir()
    with pytest.raises(Damaged, match=rf"^{path}: Is a directory"):
        data.opened()


def test_whatever_byte_of_the_index_changes_no_row_is_read(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", "lzw", count=200)
    path = data.folder / "index.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for change in (1 << place % 8, 0xFF):
            flipped = bytearray(whole)
            flipped[place] ^= change
            path.write_bytes(flipped)
            with pytest.raises(Damaged, match=f"^{data.folder}/"):
                _epoch(data)


def test_there_may_be_more_files_than_a_process_may_have_open(tmp_path: Path) -> None:
    data = _written(tmp_path / "data", "lzw", count=100 * _FRAME_ROWS)
    assert len(list(data.folder.glob("*.Z"))) == 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (90, hard))
    try:
        rows = sum(len(batch) for batch in _epoch(data))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rows == 100 * _FRAME_ROWS


_COMPRESS_FOR_LONG = """
import sys
from pathlib import Path
import numpy
from membench.data.codecs import Lzma
from membench.data.dataset import Dataset
from membench.data.layouts import Integers
from membench.data.shards import Shards
from membench.plugins.storage import Storage

rows = numpy.random.default_rng(0).integers(0, 256, (2**18, 256), numpy.uint8)
Dataset.written(rows, Storage(Shards(), Integers("uint8"), Lzma(6), "stream", 2**16), 256, Path(sys.argv[1]))
"""


def _interrupted(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Compress 64 MiB in a process of its own, and interrupt it when some frames have been written."""
    with subprocess.Popen(
        [sys.executable, "-c", _COMPRESS_FOR_LONG, str(folder)], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while sum(path.stat().st_size for path in folder.parent.rglob("frames.*")) < 200_000:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_an_interrupted_compression_leaves_nothing(tmp_path: Path) -> None:
    code, said = _interrupted(tmp_path / "data", signal.SIGINT)
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_compression_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    code, _ = _interrupted(tmp_path / "data", signal.SIGKILL)
    assert code == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    for folder in (tmp_path / "data", partial):
        data = Dataset(
            folder, Storage(Shards(), Integers("uint8"), codecs.Lzma(6), "stream", 2**16), Extent(2**18, 256, 256)
        )
        with pytest.raises(Damaged, match=rf"^{folder}: no training data are here"):
            data.opened()
    assert _epoch(_written(tmp_path / "data", "lzma"))  # and is in nobody's way


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    class Full(codecs.Gzip):
        def compress(self, raw: bytes) -> bytes:
            if raw == _rows()[_FRAME_ROWS : 2 * _FRAME_ROWS].astype("uint8").tobytes():
                raise OSError(28, "No space left on device")
            return super().compress(raw)

    storage = Storage(Shards(), Integers("uint8"), Full(1), "stream", _FRAME_ROWS * _LENGTH)
    with pytest.raises(OSError, match="No space left"):
        Dataset.written(_rows(), storage, 256, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
