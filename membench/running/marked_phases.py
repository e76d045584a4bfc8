"""The phases that a user's program marks, measured from outside, and the whole that they lie in."""

from __future__ import annotations

import dataclasses
import time

from membench.errors import one_line
from membench.host import procfs
from membench.protocol.readings import PhaseReading, outer_phase
from membench.running.observer import Observer, Seen

WHOLE = "script"
"""The phase that a program is in from its start to its end."""

MOST_PHASES = 200
_LONGEST_NAME = 100
_SUMMED = ("samples", "gpu_energy_j")
_LAST = ("ended_s", "gpu_process_end_bytes", "gpu_used_end_bytes", "gpu_unknown")


@dataclasses.dataclass
class _Entry:
    """A phase so far: what was seen in its stretches, and its peak by the kernel."""

    name: str
    duration_s: float = 0.0
    passes: int = 0
    peak_footprint_bytes: int | None = None
    seen: Seen | None = None

    def take_up(self, seen: Seen, peak_bytes: int | None) -> None:
        """Add a stretch that lies in the phase."""
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
        """The phase with the peak of the whole tree: of program and children together a bound, since it was sampled."""
        seen = self.seen or Seen()
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
    """Hears at which moments a program enters and leaves phases, and divides by them what is seen of it.

    Between two such moments lies a stretch, of which the kernel knows the peak; a phase's is the highest of its
    stretches. What children held is seen in samples only.
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

    def end(self, at_s: float, peak_bytes: int, least_bytes: int) -> list[PhaseReading]:
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

    def _spread(self, seen: Seen, peak_bytes: int | None) -> None:
        """Put what was seen in a stretch into the phases that it lies in."""
        for name in self._open:
            self._entries[name].take_up(seen, peak_bytes)


def _kept(name: str) -> str:
    return one_line(name)[:_LONGEST_NAME] or "unnamed"
