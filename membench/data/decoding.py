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
    """Blocks that are read as they are wanted, and the thread that reads ahead where they have to be decoded.

    It stays from one epoch to the next, for starting it takes as long as decoding a block, and ends with this.
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
        """One more block is there; two threads can count at once, as an iterator gives each number to one of them."""
        if next(self._left) == 0:
            self.ended.set()


class Decoding:
    """Blocks of several windows, decoded in their order by all threads that come by."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._waiting: collections.deque[tuple[Filling, range, Numbers]] = collections.deque()

    def begin(self, rows: Ids, blocks: list[tuple[range, Numbers]]) -> Filling:
        filling = Filling(rows, len(blocks))
        self._waiting.extend((filling, block, places) for block, places in blocks)
        return filling

    def finished(self, filling: Filling) -> Ids:
        """The rows of a window, once they are all there; whoever wants them helps.

        Raises:
            Damaged: if a frame is not what was written.
        """
        try:
            while not filling.ended.is_set() and self._one():
                pass
            filling.ended.wait()
            if filling.failed is not None:
                raise filling.failed
            return filling.rows
        finally:
            filling.failed = None  # as in ``_one``: its traceback leads here

    def go_on(self) -> None:
        """Decode until nothing waits."""
        while self._one():
            pass

    def stop(self) -> None:
        """Begin with no block any more."""
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
        except BaseException as error:  # whoever wants the window hears it, whomever it befell
            filling.failed = error
            filling.ended.set()
            del filling  # or the error would lead to itself, and keep the file open until it is collected
            if not isinstance(error, Exception):  # an interrupt is not to wait for the window
                raise
        return True


def read_whole(read: Read, block: range, shape: tuple[int, int]) -> Ids:
    """The rows of a block, if they have the shape that was kept; numpy would fill up or cut off what is put in place.

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
    """Each row as one item, which numpy moves at once: by tokens it takes half as long again."""
    if rows.strides[1] != rows.itemsize:
        rows = rows.copy()
    return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]


class Room:
    """Memory for the rows of a window, lent out again once nothing is left of what was lent."""

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
    """Stands between a room and the arrays of its memory: numpy keeps it for as long as there is one of them."""

    def __init__(self, memory: Ids) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__
