"""What glibc's malloc counts about itself, and how much of its heap is free but still resident."""

from __future__ import annotations

import ctypes
import functools
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
    """Return the bytes of the heap that are free but resident: holes between blocks, smaller than a page or two.

    Resident memory includes them, the blocks in use do not. Takes some 20 µs a MiB of the heap.

    Returns:
        0 if it is not known: if there are heaps beside the one that grows at the program break, as other threads have
        that allocate under the default settings.
    """
    found = counts()
    first, last = procfs.program_break_at_start(), _glibc().sbrk(0)
    # The break lies at most a page or an alignment beyond what malloc counts.
    if found.heap_bytes > last - first:
        return 0
    return max(0, procfs.resident_in(first, last) - found.used_bytes)
