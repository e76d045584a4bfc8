"""How long a thread sleeps, by the kernel's own count (Linux)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True)
class ThreadTime:
    """What the calling thread has done with its time until now, in seconds.

    Attributes:
        at_s: the monotonic clock.
        ran_s: it ran on a core.
        ready_s: it was ready to run and had no core.
    """

    at_s: float
    ran_s: float
    ready_s: float

    @classmethod
    def now(cls) -> ThreadTime | None:
        """Read the time of the calling thread; ``None`` if the kernel does not report it."""
        try:
            ready_ns = int(_SCHEDSTAT.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return cls(time.perf_counter(), time.thread_time(), ready_ns / 1e9)

    def slept_s(self, later: ThreadTime) -> float:
        """Return for how long the thread slept until ``later``: it neither ran nor was ready to run."""
        return max(0.0, later.at_s - self.at_s - (later.ran_s - self.ran_s) - (later.ready_s - self.ready_s))
