"""Rows of token ids in a folder, and batches out of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.data.codec_timing import Timed
from membench.data.order import Window, block_rows, power_of_two, windows
from membench.data.storage import Damaged, Extent, Frame, Storage
from membench.plugins import Unsuitable

if TYPE_CHECKING:
    import torch

    from membench.data.storage import Ids

_BLOCKS_AT_ONCE = 4
_DECODERS = 2
"""Threads that decode ahead, so that a fast codec does not wait for the batches to be made."""
_MB = 1e6


@dataclass(frozen=True)
class Dataset:
    """What a storage keeps of a corpus, and how it is to be read."""

    folder: Path
    storage: Storage
    extent: Extent

    @property
    def frame_rows(self) -> int:
        return frame_rows(self.storage, self.extent)

    @classmethod
    def written(cls, rows: Ids, storage: Storage, vocabulary: int, folder: Path) -> Dataset:
        """Keep rows (rows, tokens) in a folder that is not there yet."""
        extent = Extent(len(rows), rows.shape[1], vocabulary)
        if storage.codec is not None:
            storage = replace(storage, codec=Timed(storage.codec))
        step = frame_rows(storage, extent)
        frames = (rows[start : start + step] for start in range(0, len(rows), step))
        storage.format.write(frames, extent, storage, folder)
        return cls(folder, storage, extent)

    def packed_bytes(self) -> int:
        """Bytes of the rows as they are laid out, before they are compressed."""
        return self.extent.rows * self.storage.layout.bytes_per_row(self.extent)

    def facts(self) -> dict[str, tuple[float, str]]:
        """Size, and where there is a codec its ratio and speeds, from reading every frame once.

        Raises:
            Damaged: if what was written cannot be read.
        """
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        found: dict[str, tuple[float, str]] = {"data_bytes": (size, "size of the files that hold the training data")}
        frame = self.storage.format.open(self.extent, self.storage, self.folder)
        for number in range(-(-self.extent.rows // self.frame_rows)):
            frame(number)
        if isinstance(clock := self.storage.codec, Timed):
            source = "monotonic clock around the codec, on one thread, under the pinned allocator"
            found["compression_ratio"] = (clock.raw_bytes / clock.stored_bytes, "bytes into the codec over bytes out")
            found["compress_mb_per_s"] = (clock.raw_bytes / _MB / clock.compress_s, source)
            found["decompress_mb_per_s"] = (clock.decompressed_bytes / _MB / clock.decompress_s, source)
        return found

    def opened(self) -> Frame:
        """Ready to read: decoded now, if it is read whole."""
        import numpy

        frame = self.storage.format.open(self.extent, self.storage, self.folder)
        if self.storage.reading != "whole":
            return frame
        step, whole = self.frame_rows, None
        for number in range(-(-self.extent.rows // step)):
            rows = frame(number)
            if whole is None:
                whole = numpy.empty((self.extent.rows, self.extent.length), rows.dtype)
            whole[number * step : number * step + len(rows)] = rows
        assert whole is not None
        kept = whole
        return lambda number: kept[number * step : (number + 1) * step]

    def batches(self, size: int, seed: int, epoch: int, frame: Frame, share: tuple[int, int] = (0, 1)) -> Iterator[Any]:
        """The batches of an epoch, (size, tokens) int64; the last has the rows that are left.

        Args:
            frame: as ``opened`` gives it.
            share: which of how many readers this is; each has windows of its own.
        """
        import numpy
        import torch

        all_windows = windows(self.extent, self.frame_rows, _BLOCKS_AT_ONCE, seed, epoch)
        mine = itertools.islice(all_windows, share[0], None, share[1])
        left: Any = numpy.empty((0, self.extent.length), numpy.uint8)
        for window, rows in _ahead(mine, frame, self.storage.reading == "stream"):
            first = -len(left) % size  # so many rows fill the batch that the last window began
            if first:
                left = numpy.concatenate([left, rows.take(window.order[:first], axis=0)])
                if len(left) < size:
                    continue
                yield torch.from_numpy(left.astype(numpy.int64))
            last = len(rows) - (len(rows) - first) % size
            for start in range(first, last, size):
                batch = rows.take(window.order[start : start + size], axis=0)
                yield torch.from_numpy(batch.astype(numpy.int64))
            left = rows.take(window.order[last:], axis=0)
            del rows  # before the next window's are put together
        if len(left):
            yield torch.from_numpy(left.astype(numpy.int64))


def endless(data: Dataset, batch_size: int, seed: int, workers: int) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other; what does not fill one is left out. Opening the data is part of the first.

    Raises:
        Unsuitable: if no reader has rows enough for a batch.
    """
    opened = epochs(data, batch_size, seed, workers)
    for epoch in itertools.count():
        found = False
        for batch in opened(epoch):
            if len(batch) == batch_size:
                found = True
                yield batch
        if not found:
            raise Unsuitable(
                f"{data.extent.rows} rows, shared out among {workers} processes, give none the {batch_size} of a batch"
            )


def epochs(data: Dataset, batch_size: int, seed: int, workers: int) -> Callable[[int], Iterator[torch.Tensor]]:
    """Opens the data, and gives the batches of an epoch by its number.

    Args:
        workers: processes of torch's ``DataLoader`` that read, each a share of the windows and with all that reading
            wants; 0: this process does. They start anew with each epoch, as is the ``DataLoader``'s own way, and so run
            under the allocator that the measuring has chosen by then.
    """
    if workers == 0:
        frame = data.opened()
        return lambda epoch: data.batches(batch_size, seed, epoch, frame)
    from torch.utils.data import DataLoader

    from membench.data.loading import Batches

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        source = Batches(data, batch_size, seed, epoch)
        try:
            yield from DataLoader(source, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        except Damaged as error:  # what it says stands at the end of the traceback that came with it
            raise Damaged(str(error).strip().rpartition("\n")[2].partition(": ")[2]) from None

    return batches


def frame_rows(storage: Storage, extent: Extent) -> int:
    """Rows of a frame: a power of two, as those of a block are, so that a block is so many whole frames."""
    return min(block_rows(extent.length), power_of_two(storage.frame_tokens // extent.length))


def _ahead(some: Iterable[Window], frame: Frame, decodes: bool) -> Iterator[tuple[Window, Ids]]:
    """Each window with its rows; where frames are decoded, the next window's are while this one is worked through."""
    import numpy

    if not decodes:
        for window in some:
            yield window, numpy.concatenate([frame(number) for number in window.frames])
        return
    with ThreadPoolExecutor(_DECODERS) as threads:

        def begun(window: Window) -> tuple[Window, list[Future[Ids]]]:
            return window, [threads.submit(frame, number) for number in window.frames]

        coming = map(begun, some)
        following = next(coming, None)
        while following is not None:
            window, decoding = following
            rows = numpy.concatenate([decoded.result() for decoded in decoding])
            del following, decoding  # frames that were decoded are not kept beside the rows that they gave
            following = next(coming, None)
            yield window, rows
            del rows
