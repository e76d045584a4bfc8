"""Phases marked by a user's program, measured from outside, and the phase of the whole program."""

from __future__ import annotations

import dataclasses
import time

from membench.errors import one_line
from membench.host import procfs
from membench.protocol.readings import PhaseReading, outer_phase
from membench.running.observer import Observed, Observer

WHOLE = "script"
"""The name of the phase that lasts from the start of a program to its end."""

MOST_PHASES = 200
_LONGEST_NAME = 100
_SUMMED = ("samples", "gpu_energy_j")
_LAST = ("ended_s", "gpu_process_end_bytes", "gpu_used_end_bytes", "gpu_unknown")


@dataclasses.dataclass
class _Entry:
    """The accumulated readings of a phase: samples of the observer and the kernel's peak."""

    name: str
    duration_s: float = 0.0
    passes: int = 0
    peak_footprint_bytes: int | None = None
    seen: Observed | None = None

    def add(self, seen: Observed, peak_bytes: int | None) -> None:
        """Add the readings of an interval in which the phase was active."""
        if peak_bytes is not None:
            self.peak_footprint_bytes = max(peak_bytes, self.peak_footprint_bytes or 0)
        if self.seen is None:
            self.seen = dataclasses.replace(seen)
            return
        for name, value in vars(seen).items():
            before = getattr(self.seen, name)
            if before is None or name in _LAST:
                setattr(self.seen, name, value)
            elif value is not None and name != "began_s":
                setattr(self.seen, name, before + value if name in _SUMMED else max(before, value))

    def reading(self, inside: str | None, least_bytes: int) -> PhaseReading:
        """Return the phase with the peak of the program and its children; with children a sampled bound."""
        seen = self.seen or Observed()
        own, together = self.peak_footprint_bytes, seen.family_rss_bytes
        found = seen.complete(
            PhaseReading(
                name=self.name, allocator="default", inside=inside, duration_s=self.duration_s,
                passes=self.passes, peak_footprint_bytes=own,
            )
        )  # fmt: skip
        is_known = own is not None and (own > least_bytes or self.name != WHOLE)
        if together is not None:
            sure = max(own, together) if is_known and own is not None else together
            return dataclasses.replace(found, own_peak_bytes=own, peak_footprint_bytes=sure, bound="at least")
        return found if is_known or own is None else dataclasses.replace(found, bound="at most")


class MarkedPhases:
    """The phases of a program, tracked by the moments at which it enters and leaves them.

    Between two such moments lies an interval, for which the kernel reports an exact peak. The peak of a phase is the
    maximum over its intervals. The memory of child processes is only sampled.
    """

    def __init__(self, pid: int, observer: Observer) -> None:
        self._pid, self._observer = pid, observer
        self._entries: dict[str, _Entry] = {}
        self._open: dict[str, int] = {}
        self._entered_at: dict[str, float] = {}
        self._knows_peaks = True
        self._raised: tuple[str, str] | None = None
        self.left_out = False
        self._observer.begin_phase()
        self._begin(WHOLE)

    def enter(self, name: str) -> str:
        """Record that the program enters a phase, and return the name under which it is stored."""
        self._end_interval()
        self._raised = None
        name = _stored_name(name)
        self._observer.begin_phase()
        self._begin(name)
        return name

    def leave(self, name: str, raised: str | None) -> None:
        """Record that the program leaves a phase; ``raised`` is the type of the exception, if one ended the phase."""
        at_s = time.monotonic()
        self._end_interval()
        name = _stored_name(name)
        self._leave(name, at_s)
        if raised is None:
            self._raised = None
        elif self._raised is None:
            self._raised = (name, raised)
        self._observer.begin_phase()

    def ended_in(self, last_line: str) -> str:
        """Return the phase in which the program ended.

        Args:
            last_line: the last line of its standard error, which names the exception that ended it.
        """
        if len(self._open) > 1:
            return next(reversed(self._open))
        name, raised = self._raised or (WHOLE, "")
        return name if raised in last_line else WHOLE

    def end(self, at_s: float, peak_bytes: int, least_bytes: int) -> list[PhaseReading]:
        """End all phases and return them in the order of first entry; the whole program comes first.

        Args:
            at_s: the end of the program, by the monotonic clock.
            peak_bytes: the kernel's peak in the last interval.
            least_bytes: the smallest peak that is reported as exact; a lower one is reported as "at most".
        """
        self._distribute(self._observer.end_phase(), peak_bytes)
        for name in list(self._open):
            self._open[name] = 1
            self._leave(name, at_s)
        if not self._knows_peaks:  # without resets, the last peak is that of the whole program
            for name, entry in self._entries.items():
                entry.peak_footprint_bytes = peak_bytes if name == WHOLE else None
        names = list(self._entries)
        return [entry.reading(outer_phase(name, names), least_bytes) for name, entry in self._entries.items()]

    def _begin(self, name: str) -> None:
        if name not in self._entries and len(self._entries) > MOST_PHASES:
            self.left_out = True
            return
        self._entries.setdefault(name, _Entry(name))
        self._open[name] = self._open.pop(name, 0) + 1
        self._entered_at.setdefault(name, time.monotonic())

    def _leave(self, name: str, at_s: float) -> None:
        if name not in self._open:
            return
        self._open[name] -= 1
        if not self._open[name]:
            del self._open[name]
            self._entries[name].duration_s += max(0.0, at_s - self._entered_at.pop(name))
            self._entries[name].passes += 1

    def _end_interval(self) -> None:
        peak_bytes = None
        try:
            peak_bytes = procfs.resident(self._pid).peak_bytes
            procfs.reset_peak(self._pid)
        except (KeyError, FileNotFoundError, ProcessLookupError):  # the process is ending
            pass
        except OSError:  # the kernel denies the reset
            self._knows_peaks = False
        self._distribute(self._observer.end_phase(), peak_bytes)

    def _distribute(self, seen: Observed, peak_bytes: int | None) -> None:
        """Add the readings of an interval to all phases that are active in it."""
        for name in self._open:
            self._entries[name].add(seen, peak_bytes)


def _stored_name(name: str) -> str:
    return one_line(name)[:_LONGEST_NAME] or "unnamed"
