"""Whether other processes use the cores that this one needs (Linux)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from membench.host import procfs

_STAT = Path("/proc/stat")
_SHORTEST_LOOK_S = 0.1
"""The kernel counts the use of a core in ticks of some 10 ms."""
_LARGEST_SHARE = 0.1
"""Of the cores that the threads of this process need, the share that other processes may use on a calm machine."""


@dataclass(frozen=True)
class _Use:
    at_s: float
    busy_s: float
    own_s: float


class Others:
    """The use of this process's cores by other processes, from one look to the next.

    Args:
        threads: the number of threads that need a core each.
        family: the process whose descendants belong together; see ``procfs.cores``.
    """

    def __init__(self, threads: int, family: int | None = None) -> None:
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._needed = min(threads, len(self._cores))
        self._family = family
        self._last = self._read()

    @property
    def are_known(self) -> bool:
        """Whether the kernel reports the use of cores."""
        return self._last is not None

    def take_cores(self) -> bool | None:
        """Return whether others have used cores that are needed here since the last look.

        ``None`` if that is not known: the last look was less than 0.1 s ago, or the kernel reports no use of cores.
        """
        now, before = self._read(), self._last
        if now is None or before is None or now.at_s - before.at_s < _SHORTEST_LOOK_S:
            return None
        self._last = now
        used = (now.busy_s - before.busy_s - (now.own_s - before.own_s)) / (now.at_s - before.at_s)
        return len(self._cores) - used < (1 - _LARGEST_SHARE) * self._needed

    def _read(self) -> _Use | None:
        busy_s, own = busy_cores_s(self._cores), procfs.cores(self._family)
        return None if busy_s is None or own is None else _Use(time.monotonic(), busy_s, own.used_s)


class WatchedWaiting:
    """For how long the threads of another process and of its descendants wait for cores, from repeated looks.

    What threads wait after the last look before they end is not seen.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._waited_ns: dict[tuple[int, str], int] = {}
        self._looked_at_s = -math.inf

    @property
    def waited_s(self) -> float | None:
        """Return the seconds, summed over threads; ``None`` if the kernel reports none."""
        return sum(self._waited_ns.values()) / 1e9 if self._waited_ns else None

    def look(self, descendants: Collection[int]) -> None:
        """Look at all threads, if the last look was long enough ago: it takes some 25 µs a thread."""
        if time.monotonic() - self._looked_at_s < _SHORTEST_LOOK_S:
            return
        self._looked_at_s = time.monotonic()
        for pid in (self._pid, *descendants):
            for thread, waited_ns in procfs.threads_waited_ns(pid).items():
                self._waited_ns[pid, thread] = waited_ns


def busy_cores_s(cores: Collection[int]) -> float | None:
    """Return for how long cores were used since the machine started, in seconds summed; ``None`` if not known.

    Time that a hypervisor gave to others counts as used.
    """
    try:
        lines = _STAT.read_text().splitlines()
        named = {f"cpu{core}" for core in cores}
        ticks = [
            sum(int(fields[at]) for at in (1, 2, 3, 6, 7, 8))  # user, nice, system, irq, softirq, steal
            for line in lines
            if (fields := line.split()) and fields[0] in named
        ]
    except (OSError, IndexError, ValueError):
        return None
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks and len(ticks) == len(named) else None
