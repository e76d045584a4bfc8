"""The ranks that a measured program starts by itself, as ``torchrun`` does, and what each of them takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from membench.host import procfs
from membench.protocol.readings import LAUNCHED_RANK, PhaseReading, ProcessReading
from membench.running.derived_metrics import resolution_bytes

_MOST_RANKS = 1000


@dataclass
class _Seen:
    """A process of a rank: the kernel's peak when it was last read, and when it was seen."""

    peak_bytes: int
    began_s: float
    ended_s: float


class LaunchedRanks:
    """Descendants of a program that have a rank in their environment (``RANK``), by rank.

    A rank may consist of several processes, such as a shell or workers that load data; the one with the highest peak
    stands for it.
    """

    def __init__(self, pid: int) -> None:
        """Look for ranks below a process; if it has a rank itself, what it starts belongs to it."""
        self._is_rank_itself = procfs.rank_of(pid) is not None
        self._rank_of: dict[int, int] = {}
        self._seen: dict[int, dict[int, _Seen]] = {}

    def look(self, descendants: Iterable[int], at_s: float) -> None:
        """Read the kernel's peak of each process of a rank.

        Args:
            at_s: seconds since the job's first process was started.
        """
        if self._is_rank_itself:
            return
        for pid in descendants:
            rank = self._rank_of.get(pid)
            # A process that was just forked has the environment of its parent until it runs a program of its own.
            if rank is None and (rank := procfs.rank_of(pid)) is not None and len(self._rank_of) < _MOST_RANKS:
                self._rank_of[pid] = rank
            if rank is None:
                continue
            try:
                peak_bytes = procfs.resident(pid).peak_bytes
            except (OSError, KeyError):  # it has ended
                continue
            seen = self._seen.setdefault(rank, {}).setdefault(pid, _Seen(0, at_s, at_s))
            seen.peak_bytes, seen.ended_s = max(peak_bytes, seen.peak_bytes), at_s

    def readings(self, device: str, whole: str, kernel_peak_bytes: int | None) -> tuple[ProcessReading, ...]:
        """Return a reading of each rank, with one phase for all of it.

        The kernel counts a process's peak exactly, and drops it when the process ends; what a rank took after the last
        sample is not seen. A peak that is the highest of all processes is exact, the others are at least so high.

        Args:
            device: the job's device.
            whole: the name of the phase.
            kernel_peak_bytes: the highest peak of the program and all processes it waited for; ``None`` if it may not
                have waited for all its ranks.
        """
        found = []
        for rank in sorted(self._seen):
            pid, seen = max(self._seen[rank].items(), key=lambda each: each[1].peak_bytes)
            is_exact = kernel_peak_bytes is not None and abs(seen.peak_bytes - kernel_peak_bytes) <= resolution_bytes()
            phase = PhaseReading(
                name=whole, allocator="default", duration_s=seen.ended_s - seen.began_s, began_s=seen.began_s,
                ended_s=seen.ended_s, peak_footprint_bytes=seen.peak_bytes, own_peak_bytes=seen.peak_bytes,
                bound=None if is_exact else "at least",
            )  # fmt: skip
            found.append(ProcessReading(role=LAUNCHED_RANK, rank=rank, device=device, pid=pid, phases=(phase,)))
        return tuple(found)
