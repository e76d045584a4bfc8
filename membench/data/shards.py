"""A folder of shards: frames of packed rows, compressed each by itself, with an index that knows their checksums.

Frames of a codec whose own tool reads several in a row lie in one file; else each has a file of its own, so that what
is here can always be read without membench.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from membench.data.partial import whole_or_not_at_all
from membench.data.storage import Damaged, Extent, Frame, Storage

if TYPE_CHECKING:
    from membench.data.storage import Ids

_INDEX, _VERSION = "index.json", 1


class _Entry(NamedTuple):
    """Where a frame lies, and what it must be."""

    file: str
    offset: int
    stored_bytes: int
    raw_bytes: int
    crc32: int


class Shards:
    """The format of shards; see the module."""

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        with whole_or_not_at_all(folder) as partial:
            if storage.codec is not None:
                frames = list(frames)  # views of the rows: a codec sees all of them before the first is compressed
                storage.codec.learn((storage.layout.pack(rows, extent) for rows in frames), partial)
            entries = list(_written(frames, extent, storage, partial))
            index = {"version": _VERSION, "extent": extent, "layout": storage.layout.name,
                     "codec": storage.codec.name if storage.codec else None, "frames": entries}  # fmt: skip
            (partial / _INDEX).write_text(json.dumps(index))

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Frame:
        entries = _read_index(folder, extent, storage)
        if storage.codec is not None:
            storage.codec.remember(folder)
        stored = _mapped(folder, entries) if storage.reading == "mapped" else _read(folder)

        def frame(number: int) -> Ids:
            entry = entries[number]
            return storage.layout.unpack(_raw(stored(entry), entry, storage, folder), extent)

        return frame


def _read(folder: Path) -> Callable[[_Entry], bytes]:
    """Frames read from their files, opened for each: there may be more of them than a process may have open."""
    place = str(folder)

    def stored(entry: _Entry) -> bytes:
        file = os.open(os.path.join(place, entry.file), os.O_RDONLY)
        try:
            return os.pread(file, entry.stored_bytes, entry.offset)
        finally:
            os.close(file)

    return stored


def _mapped(folder: Path, entries: Iterable[_Entry]) -> Callable[[_Entry], memoryview]:
    """Frames as pages of their files: nothing is copied, and the kernel may drop them when it wants memory."""
    import numpy

    files = {name: numpy.memmap(folder / name, mode="r").data for name in {entry.file for entry in entries}}
    return lambda entry: files[entry.file][entry.offset : entry.offset + entry.stored_bytes]


def _written(frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> Iterator[_Entry]:
    """Write packed and compressed frames; where each came to lie."""
    codec, ending = storage.codec, storage.codec.ending if storage.codec else "bin"
    joins = codec is None or codec.joins
    name, offset = f"frames.{ending}", 0
    for number, rows in enumerate(frames):
        raw = storage.layout.pack(rows, extent)
        stored = codec.compress(raw) if codec else raw
        if not joins:
            name, offset = f"{number:06}.{ending}", 0
        with (folder / name).open("ab") as file:
            file.write(stored)
        yield _Entry(name, offset, len(stored), len(raw), zlib.crc32(stored))
        offset += len(stored)


def _read_index(folder: Path, extent: Extent, storage: Storage) -> list[_Entry]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text())
        entries = [_Entry(*entry) for entry in index["frames"]]
        kept = (index["version"], tuple(index["extent"]), index["layout"], index["codec"])
    except FileNotFoundError:
        raise Damaged(f"{folder}: no shards are here: {_INDEX} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: no index of shards: {error}") from None
    wanted = (_VERSION, tuple(extent), storage.layout.name, storage.codec.name if storage.codec else None)
    if kept != wanted:
        raise Damaged(f"{path}: what is here is {kept}, and {wanted} is to be read")
    for entry in entries:
        size = (folder / entry.file).stat().st_size if (folder / entry.file).exists() else 0
        if size < entry.offset + entry.stored_bytes:
            raise Damaged(
                f"{folder / entry.file}, offset {entry.offset}: a frame of {entry.stored_bytes} bytes should be here, "
                f"and the file ends at {size}"
            )
    return entries


def _raw(stored: bytes | memoryview, entry: _Entry, storage: Storage, folder: Path) -> bytes | memoryview:
    """A frame, checked before and after it is decompressed."""
    try:
        if len(stored) != entry.stored_bytes or zlib.crc32(stored) != entry.crc32:
            raise Damaged("the frame's checksum is not what the index says")
        if storage.codec is None:
            return stored
        return storage.codec.decompress(bytes(stored), entry.raw_bytes)
    except Damaged as error:
        raise Damaged(f"{folder / entry.file}, offset {entry.offset}: {error}") from None
