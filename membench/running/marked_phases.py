"""A user's program seen from outside: what each phase that it marks took, and what the whole of it did."""

from __future__ import annotations

import time
from typing import Any

from membench.errors import one_line
from membench.host import procfs
from membench.running.observer import Observer

WHOLE = "script"
"""The phase that a program is in from its start to its end."""

MOST_PHASES = 200
_LONGEST_NAME = 100
_SUMMED = ("samples", "gpu_energy_j")
_LAST = ("ended_s", "gpu_process_end_bytes", "gpu_used_end_bytes", "gpu_unknown")


class MarkedPhases:
    """Hears at which moments a program enters and leaves phases, and divides by them what is seen of it.

    Between two such moments lies a stretch, of which the kernel knows the peak; a phase's is the highest of its
    stretches. What children held is seen in samples only.
    """

    def __init__(self, pid: int, observer: Observer) -> None:
        self._pid, self._observer = pid, observer
        self._entries: dict[str, dict[str, Any]] = {}
        self._open: dict[str, int] = {}
        self._entered_at: dict[str, float] = {}
        self._knows_peaks = True
        self._raised: tuple[str, str] | None = None
        self.left_out = False
        self._observer.begin_phase()
        self._begin(WHOLE)

    def enter(self, name: str) -> str:
        """The program enters a phase; its name as it is kept."""
        self._end_stretch()
        self._raised = None
        name = _kept(name)
        self._observer.begin_phase()
        self._begin(name)
        return name

    def leave(self, name: str, raised: str | None) -> None:
        """The program leaves a phase; ``raised`` is what kind of exception takes it out."""
        at_s = time.monotonic()
        self._end_stretch()
        name = _kept(name)
        self._leave(name, at_s)
        if raised is None:
            self._raised = None
        elif self._raised is None:
            self._raised = (name, raised)
        self._observer.begin_phase()

    def ended_in(self, said: str) -> str:
        """The phase that the program ended in; ``said`` are its last words, which name what it ended of."""
        if len(self._open) > 1:
            return next(reversed(self._open))
        name, raised = self._raised or (WHOLE, "")
        return name if raised in said else WHOLE

    def end(self, at_s: float, peak_bytes: int, least_bytes: int) -> list[dict[str, Any]]:
        """The program has ended: its phases, in the order in which they were first entered, the whole first.

        Args:
            at_s: when, by the monotonic clock.
            peak_bytes: of its last stretch; a lower one than ``least_bytes`` is told as up to that.
        """
        self._spread(self._observer.end_phase(), peak_bytes)
        for name in list(self._open):
            self._open[name] = 1
            self._leave(name, at_s)
        if not self._knows_peaks:  # never reset, the last is that of the whole
            for name, entry in self._entries.items():
                entry["peak_footprint_bytes"] = peak_bytes if name == WHOLE else None
        return [_finished(entry, least_bytes) for entry in self._entries.values()]

    def _begin(self, name: str) -> None:
        if name not in self._entries and len(self._entries) > MOST_PHASES:
            self.left_out = True
            return
        self._entries.setdefault(name, {"name": name, "allocator": "default", "duration_s": 0.0, "passes": 0,
                                        "parts": {}})  # fmt: skip
        self._open[name] = self._open.pop(name, 0) + 1
        self._entered_at.setdefault(name, time.monotonic())

    def _leave(self, name: str, at_s: float) -> None:
        if name not in self._open:
            return
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]
            self._entries[name]["duration_s"] += max(0.0, at_s - self._entered_at.pop(name))
            self._entries[name]["passes"] += 1

    def _end_stretch(self) -> None:
        peak_bytes = None
        try:
            peak_bytes = procfs.resident(self._pid).peak_bytes
            procfs.reset_peak(self._pid)
        except (KeyError, FileNotFoundError, ProcessLookupError):  # it is just ending
            pass
        except OSError:  # the kernel does not let us
            self._knows_peaks = False
        self._spread(self._observer.end_phase(), peak_bytes)

    def _spread(self, seen: dict[str, Any], peak_bytes: int | None) -> None:
        """Put what was seen in a stretch into the phases that it lies in."""
        seen["peak_footprint_bytes"] = peak_bytes
        for name in self._open:
            entry = self._entries[name]
            for key, value in seen.items():
                before = entry.get(key)
                if before is None or key in _LAST:
                    entry[key] = value
                elif value is not None and key != "began_s":
                    entry[key] = before + value if key in _SUMMED else max(before, value)


def _kept(name: str) -> str:
    return one_line(name)[:_LONGEST_NAME] or "unnamed"


def _finished(entry: dict[str, Any], least_bytes: int) -> dict[str, Any]:
    """A phase with the peak of the whole tree: of program and children together a bound, since it was sampled."""
    own, together = entry["peak_footprint_bytes"], entry["family_rss_bytes"]
    is_known = own is not None and (own > least_bytes or entry["name"] != WHOLE)
    if together is not None:
        sure = max(own, together) if is_known else together
        entry |= {"own_peak_bytes": own, "peak_footprint_bytes": sure, "bound": "at least"}
    elif not is_known and own is not None:
        entry["bound"] = "at most"
    return entry
