"""Blocks of rows, decoded ahead of their use by whichever thread is free, into memory that is used again."""

from __future__ import annotations

import collections
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from membench.plugins.storage import Read

if TYPE_CHECKING:
    import numpy

    from membench.plugins.storage import Ids, Type

    Numbers = numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]


class Opened(NamedTuple):
    """Blocks that are read on demand, and the thread that reads ahead if they have to be decoded.

    The thread lives from one epoch to the next, as starting it takes as long as decoding a block, and ends with this.
    """

    read: Read
    helper: ThreadPoolExecutor | None


class Filling:
    """The rows of a window while its blocks are decoded."""

    def __init__(self, rows: Ids, blocks: int) -> None:
        self.rows = rows
        self.items = _items(rows)
        self.ended = threading.Event()
        self.failed: BaseException | None = None
        self._left = iter(range(blocks - 1, -1, -1))

    def count_one(self) -> None:
        """Count a block as decoded. Two threads can count at once: an iterator gives each number to one of them."""
        if next(self._left) == 0:
            self.ended.set()


class Decoding:
    """Blocks of several windows, decoded in order by every thread that calls in."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._waiting: collections.deque[tuple[Filling, range, Numbers]] = collections.deque()

    def begin(self, rows: Ids, blocks: list[tuple[range, Numbers]]) -> Filling:
        filling = Filling(rows, len(blocks))
        self._waiting.extend((filling, block, places) for block, places in blocks)
        return filling

    def finished(self, filling: Filling) -> Ids:
        """Return the rows of a window once all are decoded; the caller helps.

        Raises:
            Damaged: if a frame differs from what was written.
        """
        try:
            while not filling.ended.is_set() and self._one():
                pass
            filling.ended.wait()
            if filling.failed is not None:
                raise filling.failed
            return filling.rows
        finally:
            filling.failed = None  # as in ``_one``: its traceback refers to it

    def go_on(self) -> None:
        """Decode until no block is waiting."""
        while self._one():
            pass

    def stop(self) -> None:
        """Start no more blocks."""
        self._waiting.clear()

    def _one(self) -> bool:
        try:
            filling, block, places = self._waiting.popleft()
        except IndexError:
            return False
        try:
            decoded = read_whole(self._read, block, (len(places), filling.rows.shape[1]))
            filling.items[places] = _items(decoded.astype(filling.rows.dtype, copy=False))
            filling.count_one()
        except BaseException as error:  # raised again for the caller that needs the window
            filling.failed = error
            filling.ended.set()
            del filling  # or the error would refer to itself and keep the file open until it is collected
            if not isinstance(error, Exception):  # an interrupt must not wait for the window
                raise
        return True


def read_whole(read: Read, block: range, shape: tuple[int, int]) -> Ids:
    """Read the rows of a block and check their shape: numpy would broadcast or truncate others silently.

    Raises:
        ValueError: if they do not.
    """
    rows = read(block)
    if rows.shape != shape:
        raise ValueError(
            f"frames {block.start} to {block.stop - 1} were read as {rows.shape} rows and tokens, and {shape} were kept"
        )
    return rows


def _items(rows: Ids) -> Any:
    """View each row as one item, which numpy moves at once: by tokens it takes half as long again."""
    if rows.strides[1] != rows.itemsize:
        rows = rows.copy()
    return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]


class Room:
    """Memory for the rows of a window, lent again once no array of the last loan is left."""

    def __init__(self, rows: int, length: int, kind: Type) -> None:
        import numpy

        self._memory = numpy.empty((rows, length), kind)
        self._lease: weakref.ref[_Lease] | None = None

    def is_free(self) -> bool:
        return self._lease is None or self._lease() is None

    def lent(self) -> Ids:
        import numpy

        lease = _Lease(self._memory)
        self._lease = weakref.ref(lease)
        return numpy.asarray(lease)


class _Lease:
    """The owner, for numpy, of the arrays of a room's memory: it lives as long as one of them."""

    def __init__(self, memory: Ids) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__
