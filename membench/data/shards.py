"""A folder of shards: frames of packed rows, compressed each by itself, with an index that knows their checksums.

Frames of a codec whose own tool reads several in a row lie in one file; else each has a file of its own, so that what
is here can always be read without membench.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.data import index
from membench.data.partial import whole_or_not_at_all
from membench.data.storage import Buffer, Codec, Damaged, Extent, Read, Storage

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

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Read:
        entries = index.read(folder, extent, storage, functools.partial(_name, storage))
        if storage.codec is not None:
            storage.codec.remember(folder)
        mapped = _mapped(entries) if storage.reading == "mapped" else None

        def bytes_of(run: Sequence[index.Entry]) -> Buffer:
            return index.read_bytes(run) if mapped is None else mapped[run[0].path][run[0].offset : run[-1].end]

        def read(numbers: range) -> Ids:
            run = entries[numbers.start : numbers.stop]
            sizes = [entry.rows * storage.layout.bytes_per_row(extent) for entry in run]
            if storage.codec is None:
                raw = bytes_of(run)
                _check_sizes(index.frames_of(raw, run), run, sizes)
            else:
                files = [list(some) for _, some in itertools.groupby(run, lambda entry: entry.path)]
                stored = [frame for some in files for frame in index.frames_of(bytes_of(some), some)]
                raw = _decompressed(storage.codec, stored, run, sizes)
            return storage.layout.unpack(raw, extent)

        return read


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


def _check_sizes(frames: Sequence[Buffer], run: Sequence[index.Entry], sizes: Sequence[int]) -> None:
    for frame, entry, raw_bytes in zip(frames, run, sizes, strict=True):
        if len(frame) != raw_bytes:
            raise _damaged(entry, f"the frame holds {len(frame)} bytes, and {raw_bytes} should be there")


def _decompressed(codec: Codec, stored: Sequence[Buffer], run: Sequence[index.Entry], sizes: Sequence[int]) -> bytes:
    """Frames, each of the size that its rows have, one after the other."""
    try:
        if len(run) > 1:
            return codec.decompress_all(stored, sizes)
        return codec.decompress(stored[0], sizes[0])
    except Damaged as error:
        if len(run) == 1:
            raise _damaged(run[0], error) from None
        for number in range(len(run)):  # to hear which it is
            one = slice(number, number + 1)
            _decompressed(codec, stored[one], run[one], sizes[one])
        raise


def _damaged(entry: index.Entry, why: object) -> Damaged:
    return Damaged(f"{entry.path}, offset {entry.offset}: {why}")
