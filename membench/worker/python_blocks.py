"""Free blocks of Python's own allocator, kept occupied so that no object that is measured can hide in them.

Python takes memory for objects of up to 512 bytes in arenas of 1 MiB and keeps the pages of freed objects. New objects
go into these pages first, which resident memory does not show; and pages that are kept for nobody look like memory in
use. So the free blocks are filled with objects of a known size, before the baseline and whenever memory is read.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from membench.host import procfs

_CLASS = re.compile(rb"^ +\d+ +(\d+) +\d+ +\d+ +(\d+)$", re.MULTILINE)
_POOLS = re.compile(rb"^([\d,]+) unused pools \* (\d+) bytes", re.MULTILINE)
_USED = re.compile(
    rb"^# bytes (?:in allocated blocks|lost to (?:pool headers|quantization)) += +([\d,]+)$", re.MULTILINE
)
_POOL_HEADER_BYTES = 48
_POOLS_IN_AN_ARENA = 64
_LARGEST_BYTES = 512
_EMPTY_BYTES = sys.getsizeof(b"")


@dataclass(frozen=True)
class _Blocks:
    """The allocator's blocks: free ones by size in bytes, free pools with their size, and all bytes that are in use.

    What pools with blocks in use lose to their headers and at their ends is in use, too.
    """

    free: dict[int, int]
    free_pools: int
    pool_bytes: int
    used_bytes: int


def _blocks() -> _Blocks | None:
    """Read the allocator's own statistics; ``None`` if Python runs with another allocator or has no statistics."""
    if not hasattr(sys, "_debugmallocstats") or not hasattr(os, "memfd_create"):
        return None
    # They go to the C library's standard error only.
    output, kept = os.memfd_create("statistics"), os.dup(2)
    try:
        os.dup2(output, 2)
        sys._debugmallocstats()
        os.dup2(kept, 2)
        text = os.pread(output, os.fstat(output).st_size, 0)
    finally:
        os.close(kept)
        os.close(output)
    pools, used = _POOLS.search(text), _USED.findall(text)
    if pools is None or not used:
        return None
    return _Blocks(
        {int(size): int(count) for size, count in _CLASS.findall(text)},
        _number(pools[1]),
        _number(pools[2]),
        sum(map(_number, used)),
    )


def _number(text: bytes) -> int:
    return int(text.replace(b",", b""))


class FilledBlocks:
    """Objects that occupy the free blocks of Python's allocator.

    Attributes:
        bytes: the memory that they take, which is not the measured job's.
    """

    def __init__(self) -> None:
        self._objects: list[object] = []
        self.bytes = 0

    def fill(self) -> None:
        """Occupy all free blocks that are resident. Takes some 10 ms the first time, then 2 ms."""
        before = _blocks()
        if before is None:
            return
        for size_bytes, count in before.free.items():
            self._keep(_objects(size_bytes, count))
        self._fill_pools(before)
        after = _blocks()
        assert after is not None, "the allocator is the same"
        self.bytes += after.used_bytes - before.used_bytes

    def _fill_pools(self, blocks: _Blocks) -> None:
        """Occupy free pools up to the first that was never used, which a page fault tells.

        All but one arena have been used to their ends, and used pools of an arena are taken before its fresh ones.
        """
        in_a_pool = (blocks.pool_bytes - _POOL_HEADER_BYTES) // _LARGEST_BYTES
        pages_in_a_pool = blocks.pool_bytes // os.sysconf("SC_PAGE_SIZE")
        for number in range(blocks.free_pools):
            faults = procfs.page_faults()
            self._keep(_objects(_LARGEST_BYTES, in_a_pool))
            is_fresh = procfs.page_faults() - faults >= pages_in_a_pool
            if is_fresh and blocks.free_pools - number < _POOLS_IN_AN_ARENA:
                return

    def _keep(self, objects: Iterable[object]) -> None:
        kept = tuple(objects)
        self._objects.append(kept)
        self.bytes += sys.getsizeof(kept) if sys.getsizeof(kept) > _LARGEST_BYTES else 0

    def release(self) -> None:
        """Free the objects, so that Python's allocator is as in any process."""
        self._objects.clear()
        self.bytes = 0


def _objects(size_bytes: int, count: int) -> Iterable[object]:
    """Return objects whose memory is a block of a size: a multiple of 16 bytes."""
    if size_bytes <= _EMPTY_BYTES:
        return (object() if size_bytes == 16 else 2**29 + number for number in range(count))
    return map(bytes, itertools.repeat(size_bytes - _EMPTY_BYTES, count))
