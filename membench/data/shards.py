"""A folder of shards: frames of packed rows, compressed each by itself, with an index that knows their checksums.

Frames of a codec whose own tool reads several in a row lie in one file; else each has a file of its own, so that what
is here can always be read without membench.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from membench.data import index
from membench.data.partial import whole_or_not_at_all
from membench.data.storage import Damaged, Extent, Frame, Storage

if TYPE_CHECKING:
    from membench.data.storage import Ids


class Shards:
    """The format of shards; see the module."""

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        with whole_or_not_at_all(folder) as partial:
            if storage.codec is not None:
                frames = list(frames)  # views of the rows: a codec sees all of them before the first is compressed
                storage.codec.learn((storage.layout.pack(rows, extent) for rows in frames), partial)
            index.write(partial, extent, storage, list(_written(frames, extent, storage, partial)))

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Frame:
        entries = index.read(folder, extent, storage, functools.partial(_name, storage))
        if storage.codec is not None:
            storage.codec.remember(folder)
        mapped = _mapped(entries) if storage.reading == "mapped" else None

        def frame(number: int) -> Ids:
            entry = entries[number]
            if mapped is None:
                stored: bytes | memoryview = entry.read()
            else:
                stored = mapped[entry.path][entry.offset : entry.offset + entry.stored_bytes]
                entry.check(stored)
            return storage.layout.unpack(_raw(stored, entry, extent, storage), extent)

        return frame


def _mapped(entries: Iterable[index.Entry]) -> dict[Path, memoryview]:
    """The pages of each file: nothing is copied, and the kernel may drop them when it wants memory."""
    import numpy

    return {path: numpy.memmap(path, mode="r").data for path in {entry.path for entry in entries}}


def _name(storage: Storage, number: int) -> str:
    """The file that a frame lies in."""
    if storage.codec is None:
        return "frames.bin"
    return f"{'frames' if storage.codec.joins else f'{number:06}'}.{storage.codec.ending}"


def _written(frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> Iterator[index.Kept]:
    """Write packed and compressed frames; what is to be kept of each."""
    for number, rows in enumerate(frames):
        raw = storage.layout.pack(rows, extent)
        stored = storage.codec.compress(raw) if storage.codec else raw
        with (folder / _name(storage, number)).open("ab") as file:
            file.write(stored)
        yield index.Kept(len(stored), index.checksum(stored))


def _raw(stored: bytes | memoryview, entry: index.Entry, extent: Extent, storage: Storage) -> bytes | memoryview:
    """A frame, decompressed, of the size that its rows have."""
    raw_bytes = entry.rows * storage.layout.bytes_per_row(extent)
    try:
        if storage.codec is not None:
            return storage.codec.decompress(bytes(stored), raw_bytes)
        if len(stored) != raw_bytes:
            raise Damaged(f"the frame holds {len(stored)} bytes, and {raw_bytes} should be there")
        return stored
    except Damaged as error:
        raise Damaged(f"{entry.path}, offset {entry.offset}: {error}") from None
