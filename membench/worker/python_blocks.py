"""Free blocks of Python's own allocator, kept occupied so that no object that is measured can hide in them.

Python takes memory for objects of up to 512 bytes in arenas of 1 MiB and keeps the pages of freed objects. New objects
go into these pages first, which resident memory does not show; and pages that are kept for nobody look like memory in
use. So the free blocks are filled with objects of a known size, before the baseline and whenever memory is read.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

from membench.host import procfs

_CLASS = re.compile(rb"^ +\d+ +(\d+) +\d+ +\d+ +(\d+)$", re.MULTILINE)
_POOLS = re.compile(rb"^([\d,]+) unused pools \* (\d+) bytes", re.MULTILINE)
_ARENAS = re.compile(rb"^# arenas allocated current += +(\d+)$", re.MULTILINE)
_POOL_HEADER_BYTES = 48
_POOLS_IN_AN_ARENA = 64
_LARGEST_BYTES = 512
_EMPTY_BYTES = sys.getsizeof(b"")


@dataclass(frozen=True)
class _Blocks:
    """The allocator's free blocks by their size in bytes, its free pools with their size, and its arenas."""

    free: dict[int, int]
    free_pools: int
    pool_bytes: int
    arenas: int


def _blocks() -> _Blocks | None:
    """Read the allocator's own statistics; ``None`` if Python runs with another allocator or has no statistics."""
    if not hasattr(sys, "_debugmallocstats") or not hasattr(os, "memfd_create"):
        return None
    # They go to the C library's standard error only.
    try:
        kept = os.dup(2)
    except OSError:  # the job has closed it
        return None
    output = os.memfd_create("statistics")
    try:
        os.dup2(output, 2)
        sys._debugmallocstats()
        os.dup2(kept, 2)
        text = os.pread(output, os.fstat(output).st_size, 0)
    finally:
        os.close(kept)
        os.close(output)
    pools, arenas = _POOLS.search(text), _ARENAS.search(text)
    if pools is None or arenas is None:
        return None
    free = {int(size): int(count) for size, count in _CLASS.findall(text)}
    return _Blocks(free, int(pools[1].replace(b",", b"")), int(pools[2]), int(arenas[1]))


class FilledBlocks:
    """Objects that occupy the free blocks of Python's allocator, as long as this is kept.

    Attributes:
        bytes: the memory that they take, which is not the measured job's.
    """

    def __init__(self) -> None:
        self._objects: list[object] = []
        self._left = _Blocks({}, 0, 0, 0)  # what was not used yet when it was last filled
        self._newest: list[object] = [None] * 256  # a page of the smallest blocks
        self.bytes = 0

    def fill(self) -> None:
        """Occupy all free blocks that are resident. Takes some 10 ms the first time, then 2 ms."""
        before = _blocks()
        if before is None:
            return
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        for size_bytes, count in before.free.items():
            freed, in_a_page = count - self._left.free.get(size_bytes, 0), page_bytes // size_bytes
            while freed > 0 and not self._occupy(size_bytes, min(freed, in_a_page)):
                freed -= in_a_page
        self._fill_pools(before)
        after = _blocks()
        assert after is not None, "the allocator is the same"
        self._left = after

    def _fill_pools(self, blocks: _Blocks) -> None:
        """Occupy free pools that were used. Only the newest arena has fresh ones, no more than it had before.

        Its used pools are taken before its fresh ones, but those of other arenas may come later.
        """
        in_a_pool = (blocks.pool_bytes - _POOL_HEADER_BYTES) // _LARGEST_BYTES
        pages_in_a_pool = blocks.pool_bytes // os.sysconf("SC_PAGE_SIZE")
        has_new_arena = blocks.arenas != self._left.arenas
        used = blocks.free_pools - (_POOLS_IN_AN_ARENA - 1 if has_new_arena else self._left.free_pools)
        for _ in range(blocks.free_pools):
            is_fresh = self._occupy(_LARGEST_BYTES, in_a_pool) >= pages_in_a_pool
            self.bytes += blocks.pool_bytes - in_a_pool * _LARGEST_BYTES  # its header, and what is left over
            used -= not is_fresh
            if is_fresh and used <= 0:
                return

    def _occupy(self, size_bytes: int, count: int) -> int:
        """Occupy blocks of a size; return the page faults that it took: blocks that were never used are not resident.

        Blocks that were used and freed are taken before the fresh ones of a pool.
        """
        objects = self._newest
        faults = procfs.page_faults()
        for place in range(count):
            objects[place] = _object(size_bytes, place)
        faults = procfs.page_faults() - faults
        kept = tuple(objects[:count])
        self._objects.append(kept)
        self.bytes += size_bytes * count + sys.getsizeof(kept)
        return faults


def _object(size_bytes: int, number: int) -> object:
    """Return an object whose memory is a block of a size, a multiple of 16 bytes; ``number`` tells it from others."""
    if size_bytes > _EMPTY_BYTES:
        return bytes(size_bytes - _EMPTY_BYTES)
    return object() if size_bytes == 16 else 2**29 + number
