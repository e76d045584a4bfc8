"""The memory that this process has in use: resident pages less those that are free within its allocators."""

from __future__ import annotations

from dataclasses import dataclass

from membench.host import procfs
from membench.worker import allocator, malloc_counts
from membench.worker.python_blocks import FilledBlocks

_SHARED_CHANGES_BYTES = 2**18
_COUNTERS_OFF_BYTES = 2**21
"""What the kernel's counters of a process may be off by on a machine of some cores."""


@dataclass(frozen=True)
class Pages:
    """Resident pages at one moment, in bytes.

    Attributes:
        anonymous_bytes: pages that nothing but memory holds: private ones, and shared ones that belong to no file.
        shared_bytes: the shared ones among the anonymous pages.
        file_bytes: pages of files, on a disk or in memory.
        peak_bytes: the kernel's peak of all pages since the last reset.
    """

    anonymous_bytes: int
    shared_bytes: int
    file_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.anonymous_bytes + self.file_bytes


class LiveMemory:
    """Reads this process's pages, and how many of them its allocators hold free.

    Attributes:
        holes_bytes: resident bytes of holes in malloc's heap when it last settled.
        free_bytes: these, and free blocks of Python's allocator, which are occupied by objects of known size.
    """

    def __init__(self) -> None:
        self.free_bytes = self.holes_bytes = 0
        self._filled = FilledBlocks()
        self._filled_before: FilledBlocks | None = None
        self._files_in_memory_bytes = self._shared_bytes = 0

    def pages(self) -> Pages:
        """Read the resident pages by the kernel's counters, which may be off by some hundred kB."""
        return self._sorted(procfs.resident())

    def pages_one_by_one(self) -> Pages:
        """Read the resident pages, and count the anonymous ones in the page tables, which is exact."""
        resident = procfs.resident()
        counted = procfs.counted_page_by_page()
        if counted is None:
            return self._sorted(resident)
        private, shared = counted
        # Pages that other processes map, too, are divided among them there; then the counter has to do.
        if abs(resident.shared_bytes - shared) > _COUNTERS_OFF_BYTES:
            shared = resident.shared_bytes
        return self._sorted(procfs.Resident(private, shared, resident.file_bytes, resident.peak_bytes))

    def _sorted(self, resident: procfs.Resident) -> Pages:
        # What is shared rarely changes, and it takes milliseconds to look which of it belongs to files.
        if abs(resident.shared_bytes - self._shared_bytes) > _SHARED_CHANGES_BYTES:
            self._shared_bytes = resident.shared_bytes
            self._files_in_memory_bytes = procfs.files_in_memory_bytes()
        of_files = min(self._files_in_memory_bytes, resident.shared_bytes)
        shared = resident.shared_bytes - of_files
        return Pages(
            resident.private_bytes + shared, shared, resident.file_bytes + of_files, resident.peak_bytes
        )  # fmt: skip

    def free_in_heap_bytes(self) -> int:
        """Return the resident free bytes of malloc's heap; 0 if it is not pinned, and they are not known."""
        return malloc_counts.free_resident_bytes() if allocator.is_pinned() else 0

    def settle(self) -> None:
        """Collect garbage, return what is free to the kernel, and count the rest of what is free."""
        allocator.settle()
        self.count_free()

    def count_free(self) -> None:
        """Count what is free, and occupy the free blocks of Python's allocator."""
        if not allocator.is_pinned():
            self._filled = FilledBlocks()  # frees the blocks, so that Python's allocator is as in any process
            self.free_bytes = self.holes_bytes = 0
            return
        self._filled.fill()
        self.holes_bytes = self.free_in_heap_bytes()
        self.free_bytes = self._filled.bytes + self.holes_bytes

    def begin_at_baseline(self) -> None:
        """Make what occupies free blocks now a part of the baseline, which is never released."""
        self._filled_before, self._filled = self._filled, FilledBlocks()
        for _ in range(2):  # settling takes some blocks itself, fewer each time
            self.settle()
