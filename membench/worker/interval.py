"""The memory between two boundaries, from the kernel's peak and its count of page faults."""

from __future__ import annotations

import os

from membench.host import procfs
from membench.worker.live_memory import Pages

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PAGES_OF_A_FILE_AT_ONCE = 65536 // _PAGE_BYTES
"""How many pages of a file the kernel maps in one page fault at most (fault_around_bytes)."""


class Interval:
    """An interval that begins now, just before the kernel's peak is reset.

    Attributes:
        start: the pages at its begin.
    """

    def __init__(self, start: Pages) -> None:
        self.start = start
        self._faults = procfs.page_faults()

    def peak(self, end: Pages) -> int:
        """Return the peak of all pages, in bytes."""
        return max(end.peak_bytes, self.start.total_bytes, end.total_bytes)

    def anonymous_peak(self, end: Pages) -> tuple[int, int]:
        """Return the bounds of the peak of anonymous pages, in bytes: the least and the most that it can be.

        The kernel knows the peak of all pages together. The pages of files at the two ends bound how many of them it
        holds, unless a file was mapped in between. Page faults tell: each anonymous page takes one of its own, where
        one maps up to 16 pages of a file.
        """
        start = self.start
        fewest, most = sorted((start.file_bytes, end.file_bytes))
        at_an_end = max(start.anonymous_bytes, end.anonymous_bytes)
        by_peak = max(end.peak_bytes - fewest, at_an_end)
        by_faults = self._by_faults(end)
        if by_faults is not None and by_faults < end.peak_bytes - most:
            return at_an_end, max(by_faults, at_an_end)
        return max(end.peak_bytes - most, at_an_end), by_peak

    def _by_faults(self, end: Pages) -> int | None:
        """Return the most that page faults allow for the peak; ``None`` if memory that others made may be in it.

        With p pages more at the peak than at the start and f faults, at most a = (16 f - p) / 15 of them are anonymous:
        the other p - a pages belong to files and took (p - a) / 16 faults, which leaves f - (p - a) / 16 >= a.
        """
        if self.start.shared_bytes or end.shared_bytes:
            return None
        faults = procfs.page_faults() - self._faults
        grown = (end.peak_bytes - self.start.total_bytes) / _PAGE_BYTES
        at_once = _PAGES_OF_A_FILE_AT_ONCE
        anonymous = (at_once * faults - grown) / (at_once - 1)
        return self.start.anonymous_bytes + int(max(0, min(anonymous, faults)) * _PAGE_BYTES)
