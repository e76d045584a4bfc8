"""A folder of shards: frames of packed rows, compressed each by itself, with an index that knows their checksums.

Frames of a codec whose own tool reads several in a row lie in one file; else each has a file of its own, so that what
is here can always be read without membench.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from membench.data import index
from membench.data.partial import whole_or_not_at_all
from membench.plugins.storage import Buffer, Codec, Damaged, Extent, Read, Storage

if TYPE_CHECKING:
    from membench.plugins.storage import Ids


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
        row_bytes = storage.layout.bytes_per_row(extent)
        if storage.codec is not None:
            storage.codec.remember(folder)
            raw_of: Callable[..., Buffer] = functools.partial(_decompressed, storage.codec, _stored(entries))
        else:
            raw_of = functools.partial(_checked, (_mapped if storage.reading == "mapped" else _opened)(entries))

        def read(numbers: range) -> Ids:
            run = entries[numbers.start : numbers.stop]
            return storage.layout.unpack(raw_of(run, [entry.rows * row_bytes for entry in run]), extent)

        return read


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


_Run: TypeAlias = Sequence[index.Entry]
"""Frames that follow each other."""


def _mapped(entries: _Run) -> Callable[[_Run], Buffer]:
    """Pages of the file that all lie in: nothing is copied, and the kernel may drop them when it wants memory."""
    import numpy

    file = numpy.memmap(entries[0].path, mode="r").data
    return lambda run: file[run[0].offset : run[-1].end]


def _opened(entries: _Run) -> Callable[[_Run], bytes]:
    return index.OpenFile(entries[0].path).bytes_of


def _stored(entries: _Run) -> Callable[[_Run], list[Buffer]]:
    """Each frame's bytes. One file stays open; of several there may be more than a process may have open."""
    if entries[0].path == entries[-1].path:
        bytes_of = _opened(entries)
        return lambda run: index.frames_of(bytes_of(run), run)
    return lambda run: [frame for one in run for frame in index.frames_of(_opened([one])([one]), [one])]


def _checked(bytes_of: Callable[[_Run], Buffer], run: _Run, sizes: Sequence[int]) -> Buffer:
    """Frames as they lie, one after the other, each of the size that its rows have."""
    raw = bytes_of(run)
    for frame, entry, raw_bytes in zip(index.frames_of(raw, run), run, sizes, strict=True):
        if len(frame) != raw_bytes:
            raise _damaged(entry, f"the frame holds {len(frame)} bytes, and {raw_bytes} should be there")
    return raw


def _decompressed(codec: Codec, stored: Callable[[_Run], list[Buffer]], run: _Run, sizes: Sequence[int]) -> bytes:
    """Frames, each of the size that its rows have, one after the other."""
    frames = stored(run)
    try:
        return codec.decompress_all(frames, sizes) if len(run) > 1 else codec.decompress(frames[0], sizes[0])
    except Damaged as error:
        for entry, frame, raw_bytes in zip(run, frames, sizes, strict=True):  # to hear which it is
            try:
                codec.decompress(frame, raw_bytes)
            except Damaged as of_one:
                raise _damaged(entry, of_one) from None
        raise _damaged(run[0], error) from None


def _damaged(entry: index.Entry, why: object) -> Damaged:
    return Damaged(f"{entry.path}, offset {entry.offset}: {why}")
