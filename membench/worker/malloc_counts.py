"""What glibc's malloc counts about itself, and how much of its heap is free but still resident."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

from membench.host import procfs

_FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


class _Counts(ctypes.Structure):
    """The C struct ``mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


class _NarrowCounts(ctypes.Structure):
    """The C struct ``mallinfo`` of earlier versions: its counters wrap around at 4 GiB."""

    _fields_ = [(name, ctypes.c_uint) for name in _FIELDS]


@dataclass(frozen=True)
class MallocCounts:
    """malloc's own counts, in bytes.

    Attributes:
        heap_bytes: all that its heaps took from the kernel, without blocks that are mapped by themselves.
        used_bytes: blocks of the heaps that are in use, their headers included.
        mapped_bytes: blocks that are mapped by themselves.
        wraps_at_bytes: the number at which the counters start again from 0.
    """

    heap_bytes: int
    used_bytes: int
    mapped_bytes: int
    wraps_at_bytes: int

    def taken_since(self, earlier: MallocCounts) -> int:
        """Return the growth of all blocks in use, in bytes; negative if they shrank."""
        grown = self.used_bytes + self.mapped_bytes - earlier.used_bytes - earlier.mapped_bytes
        half = self.wraps_at_bytes // 2
        return (grown + half) % self.wraps_at_bytes - half


@functools.cache
def _glibc() -> ctypes.CDLL:
    # Opened by its name: another library may have functions of the same names, which go before these.
    libc = ctypes.CDLL("libc.so.6")
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Counts
    libc.mallinfo.restype = _NarrowCounts
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    return libc


def counts() -> MallocCounts:
    """Return glibc's own counts, which are about the blocks of this process only if it calls glibc's malloc."""
    libc = _glibc()
    is_wide = hasattr(libc, "mallinfo2")
    found = libc.mallinfo2() if is_wide else libc.mallinfo()
    return MallocCounts(found.arena, found.uordblks, found.hblkhd, 2 ** (64 if is_wide else 32))


def free_resident_bytes() -> int:
    """Return the bytes of all heaps that are free but resident: holes between blocks, smaller than a page or two.

    Resident memory includes them, the blocks in use do not. Takes some 20 µs a MiB of the heaps.

    Returns:
        0 if it is not known: if malloc counts more memory than lies in the heaps that are found here.
    """
    heaps = [(procfs.program_break_at_start(), _glibc().sbrk(0))]
    # The break lies at most a page or an alignment beyond what malloc counts.
    if counts().heap_bytes > heaps[0][1] - heaps[0][0]:
        heaps += _heaps_of_threads()
    found = counts()
    if found.heap_bytes > sum(last - first for first, last in heaps):
        return 0
    return max(0, sum(procfs.resident_in(first, last) for first, last in heaps) - found.used_bytes)


_MOST_BYTES = 2**26
"""HEAP_MAX_SIZE of glibc on 64 bits: a heap of a thread is at most that large, and begins at a multiple of it."""


class _Heap(ctypes.Structure):
    """The first fields of glibc's struct ``heap_info``, with which the heap of a thread begins.

    A thread whose heap is full gets another one, which refers to the previous one. Its arena lies in the first of them.
    """

    _fields_ = [("arena", ctypes.c_size_t), ("previous", ctypes.c_size_t), ("size_bytes", ctypes.c_size_t)]


def _heaps_of_threads() -> list[tuple[int, int]]:
    """Find the heaps beside the one that grows at the program break, each as (first, one after the last)."""
    heaps: dict[int, _Heap] = {}
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        for begin, end in procfs.writable_mappings():
            # Neighbouring mappings of the same kind are one for the kernel, so a heap may begin within one.
            for first in range(-(-begin // _MOST_BYTES) * _MOST_BYTES, end, _MOST_BYTES):
                with contextlib.suppress(OSError, ValueError):  # unmapped meanwhile
                    heap = _Heap.from_buffer_copy(os.pread(memory, ctypes.sizeof(_Heap), first))
                    if 0 < heap.size_bytes <= min(_MOST_BYTES, end - first):
                        heaps[first] = heap
    finally:
        os.close(memory)
    return [(first, first + heap.size_bytes) for first, heap in heaps.items() if _has_arena(first, heaps)]


def _has_arena(first: int, heaps: Mapping[int, _Heap]) -> bool:
    """Return whether what looks like a heap is one, since its arena lies in the first heap of its thread."""
    arena = heaps[first].arena
    for _ in heaps:
        if first not in heaps or heaps[first].arena != arena:
            break
        if not heaps[first].previous:
            return bool(arena // _MOST_BYTES == first // _MOST_BYTES)
        first = heaps[first].previous
    return False
