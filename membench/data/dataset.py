"""Rows of token ids stored in a folder, and read from it in batches."""

from __future__ import annotations

import collections
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.data.codec_timing import Timed
from membench.data.decoding import Decoding, Filling, Opened, Room, read_whole
from membench.data.order import Window, block_rows, frame_rows, windows
from membench.plugins import Unsuitable
from membench.plugins.storage import Extent, Storage

if TYPE_CHECKING:
    from membench.data.decoding import Numbers
    from membench.plugins.storage import Ids

_BLOCKS_AT_ONCE = 2
_TOKENS_TAKEN_AT_ONCE = 2**15
"""A single batch may be so small that calling numpy takes longer than copying its rows."""
_MB = 1e6
_CODEC_CLOCK = "monotonic clock around the codec, on one thread"
_CODEC_TIMED_S = 0.2
"""The shortest time to measure over: a fast codec reads a small corpus in less than a clock can resolve."""


@dataclass(frozen=True)
class Dataset:
    """A corpus in a folder, and how it is stored and read.

    Attributes:
        padding: how many tokens of the rows are padding.
    """

    folder: Path
    storage: Storage
    extent: Extent
    padding: int = 0

    @property
    def frame_rows(self) -> int:
        return frame_rows(self.storage, self.extent)

    @classmethod
    def written(cls, rows: Ids, storage: Storage, vocabulary: int, folder: Path, padding: int = 0) -> Dataset:
        """Store rows (rows, tokens) in a folder that does not exist yet.

        Raises:
            Unsuitable: if there are no rows, or a token id is not in the vocabulary: packed, it would become another.
        """
        if not len(rows):
            raise Unsuitable("there are no rows of training data")
        extent = Extent(len(rows), rows.shape[1], vocabulary)
        if (largest := int(rows.max(initial=0))) >= vocabulary:
            raise Unsuitable(f"there is token id {largest}, and the model's vocabulary has {vocabulary}")
        if storage.codec is not None:
            storage = replace(storage, codec=Timed(storage.codec))
        step = frame_rows(storage, extent)
        frames = (rows[start : start + step] for start in range(0, len(rows), step))
        storage.format.write(frames, extent, storage, folder)
        return cls(folder, storage, extent, padding)

    def packed_bytes(self) -> int:
        """Count the bytes of all rows before they are compressed."""
        return self.extent.rows * self.storage.layout.bytes_per_row(self.extent)

    def tokens(self) -> int:
        """Count the tokens of an epoch, without padding."""
        return self.extent.rows * self.extent.length - self.padding

    def facts(self) -> dict[str, tuple[float, str]]:
        """Measure size and share of padding, and of a codec its ratio and speed, after reading every frame once.

        Raises:
            Damaged: if a frame cannot be read back.
        """
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        padding_percent = 100 * self.padding / (self.extent.rows * self.extent.length)
        found: dict[str, tuple[float, str]] = {
            "data_bytes": (size, "size of the files that hold the training data"),
            "padding_percent": (padding_percent, "count of padding in the rows"),
        }
        self._decode()
        if isinstance(clock := self.storage.codec, Timed):
            speed = clock.raw_bytes / _MB / clock.compress_s
            found["compression_ratio"] = (clock.raw_bytes / clock.stored_bytes, "bytes into the codec over bytes out")
            found["compress_mb_per_s"] = (speed, f"{_CODEC_CLOCK}, under the pinned allocator")
        return found

    def codec_speeds(self) -> list[float]:
        """Measure how many MB a second the codec alone decompresses, once per pass; an empty list without a codec."""
        speeds: list[float] = []
        if isinstance(self.storage.codec, Timed):
            began = time.perf_counter()
            while time.perf_counter() - began < _CODEC_TIMED_S:
                # With its own clock: a reader that decodes ahead may still be running.
                clock = self.storage.codec.afresh()
                replace(self, storage=replace(self.storage, codec=clock))._decode()
                speeds.append(clock.decompressed_bytes / _MB / clock.decompress_s)
        return speeds

    def timed_afresh(self, earlier_speeds: list[float]) -> dict[str, tuple[float, str]]:
        """Measure how long opening takes and how fast the codec is, to be compared with how fast data are read.

        Args:
            earlier_speeds: speeds of the codec before the data were read, because a machine's speed drifts.
        """
        began = time.perf_counter()
        self.opened()
        opening_s = time.perf_counter() - began
        found = {"open_s": (opening_s, "monotonic clock, under the default allocator")}
        if speeds := earlier_speeds + self.codec_speeds():
            found["decompress_mb_per_s"] = (statistics.median(speeds), f"{_CODEC_CLOCK}, under the default allocator")
        return found

    def _decode(self) -> None:
        read = self.storage.format.open(self.extent, self.storage, self.folder)
        for block in self._blocks():
            read(block)

    def _blocks(self) -> Iterator[range]:
        """Return the frames of each block."""
        frames, inside = -(-self.extent.rows // self.frame_rows), block_rows(self.extent.length) // self.frame_rows
        return (range(first, min(first + inside, frames)) for first in range(0, frames, inside))

    def opened(self) -> Ids | Opened:
        """Open the data: all rows, decoded now, if they are read whole."""
        import numpy

        read = self.storage.format.open(self.extent, self.storage, self.folder)
        if self.storage.reading != "whole":
            streams = self.storage.reading == "stream"
            return Opened(read, ThreadPoolExecutor(1, "reading ahead") if streams else None)
        whole = numpy.empty((self.extent.rows, self.extent.length), self.storage.layout.type(self.extent))
        for block in self._blocks():
            rows = self._rows_of(block)
            whole[rows.start : rows.stop] = read_whole(read, block, (len(rows), self.extent.length))
        return whole

    def batches(
        self, size: int, seed: int, epoch: int, opened: Ids | Opened, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Any]:
        """Yield the batches of an epoch, (size, tokens); the last one has the rows that are left.

        Ids keep the type that they are stored in: as int64, a byte becomes eight, so callers widen what they need.

        Args:
            opened: what the method of that name returned.
            share: (number, count) of this reader among those that share the windows of the epoch.
        """
        import numpy
        import torch

        all_windows = windows(self.extent, self.frame_rows, _BLOCKS_AT_ONCE, seed, epoch)
        mine = itertools.islice(all_windows, share[0], None, share[1])
        shuffled = self._decoded(mine, opened, size) if isinstance(opened, Opened) else self._taken(mine, opened, size)
        left: Any = numpy.empty((0, self.extent.length), self.storage.layout.type(self.extent))
        for rows in shuffled:
            first = -len(left) % size  # rows that complete the batch begun before
            if first:
                left = numpy.concatenate([left, rows[:first]])
                if len(left) < size:
                    continue
                yield torch.from_numpy(left)
            last = len(rows) - (len(rows) - first) % size
            if last - first == size:  # splitting it takes longer than making it
                yield torch.from_numpy(rows[first:last])
            elif last > first:
                yield from torch.split(torch.from_numpy(rows[first:last]), size)
            left = rows[last:].copy()
        if len(left):
            yield torch.from_numpy(left)

    def _taken(self, some: Iterable[Window], opened: Ids, size: int) -> Iterator[Ids]:
        """Yield rows in the order of the windows, a few batches at once, out of all rows."""
        at_once = size * max(1, _TOKENS_TAKEN_AT_ONCE // (size * self.extent.length))
        for window in some:
            numbers = self._numbers(window)[window.order]
            for start in range(0, len(numbers), at_once):
                yield opened.take(numbers[start : start + at_once], axis=0)

    def _decoded(self, some: Iterable[Window], opened: Opened, size: int) -> Iterator[Ids]:
        """Yield rows in the order of the windows: a window at once, except its last batch, which is yielded as a copy.

        A caller that still holds that batch when the next window comes then holds nothing of this window, whose memory
        is used again. If blocks are decoded, a thread starts on those of the next window meanwhile, and a caller that
        needs them helps: waiting for each other would cost a fast codec more than its work.
        """
        rooms: list[Room] = []
        decoding = Decoding(opened.read)

        def begun(window: Window) -> Filling:
            rows = self._room(rooms)[: len(window.order)]
            filling = decoding.begin(rows, self._places(window))
            if opened.helper:
                opened.helper.submit(decoding.go_on)
            return filling

        try:
            coming = map(begun, some)
            ahead = collections.deque(itertools.islice(coming, 2 if opened.helper else 1))
            while ahead:
                rows = decoding.finished(ahead.popleft())
                yield rows[:-size]
                rows = rows[-size:].copy()
                yield rows
                # Into the memory of the window just yielded, while the next may still be decoded.
                ahead.extend(itertools.islice(coming, 1))
        finally:
            decoding.stop()  # without waiting for the helper, which may be the thread that collects this generator

    def _room(self, rooms: list[Room]) -> Ids:
        """Return memory for the rows of a window: a room of which no batch is held any more, or a new one."""
        for room in rooms:
            if room.is_free():
                return room.lent()
        rows = min(self.extent.rows, _BLOCKS_AT_ONCE * block_rows(self.extent.length))
        rooms.append(Room(rows, self.extent.length, self.storage.layout.type(self.extent)))
        return rooms[-1].lent()

    def _places(self, window: Window) -> list[tuple[range, Numbers]]:
        """Return a window's blocks, each with the places of its rows in the window's order."""
        import numpy

        places = numpy.empty_like(window.order)
        places[window.order] = numpy.arange(len(places))
        ends = itertools.accumulate((len(self._rows_of(block)) for block in window.blocks), initial=0)
        return [
            (block, places[start:end])
            for block, (start, end) in zip(window.blocks, itertools.pairwise(ends), strict=True)
        ]

    def _rows_of(self, block: range) -> range:
        """Return which of all rows a block's frames hold."""
        return range(block.start * self.frame_rows, min(block.stop * self.frame_rows, self.extent.rows))

    def _numbers(self, window: Window) -> Numbers:
        """Return which of all rows a window holds."""
        import numpy

        rows = map(self._rows_of, window.blocks)
        return numpy.concatenate([numpy.arange(some.start, some.stop) for some in rows])
