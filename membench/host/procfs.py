"""Reading and resetting a process's memory through /proc (Linux). No torch, no state."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Resident:
    """Resident memory at one moment; ``peak_bytes`` is the kernel's own peak since the last reset."""

    anonymous_bytes: int
    file_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.anonymous_bytes + self.file_bytes


def resident(pid: int | str = "self") -> Resident:
    """Resident memory from /proc/<pid>/status; shared memory counts as file pages."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[key] = int(value.split()[0]) * 1024
    return Resident(found["RssAnon"], found["RssFile"] + found["RssShmem"], found["VmHWM"])


@dataclass(frozen=True)
class Cores:
    """What this process has had of the machine's cores since it began, in seconds summed over threads.

    Attributes:
        waited_s: threads were ready to run and had none; of those threads that there are now.
        used_s: threads ran, those that have ended, those of descendants and those of sibling ranks included.
    """

    waited_s: float
    used_s: float

    def waited_for_others_s(self, earlier: Cores, duration_s: float, cores: int) -> float:
        """What of the waiting since ``earlier`` others can have caused: no more than the time for which the cores were
        not this process's own. Threads that wait for one another while all cores are theirs wait for nobody else.

        Args:
            cores: how many it may use.
        """
        waited_s = self.waited_s - earlier.waited_s  # a thread that has ended took along what it had waited
        not_ours_s = cores * duration_s - (self.used_s - earlier.used_s)
        return max(0.0, min(waited_s, not_ours_s))


def cores(family: int | None = None) -> Cores | None:
    """``None``: the kernel does not tell (/proc/<pid>/task/<tid>/schedstat: nanoseconds run, nanoseconds waited).

    Args:
        family: the process whose descendants belong together: what they use, nobody else has. Without one it is this.
    """
    own = os.getpid()
    try:
        tasks = os.listdir("/proc/self/task")
        waited_ns = sum(_schedstat(f"self/task/{task}")[1] for task in tasks)
        used_ns = sum(_of_all_threads_ns(pid) for pid in children(family or own) if pid != own)
    except (OSError, IndexError, ValueError):
        return None
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cores(waited_ns / 1e9, time.process_time() + used_ns / 1e9 + reaped.ru_utime + reaped.ru_stime)


def _of_all_threads_ns(pid: int) -> int:
    """For how long threads of a process ran; 0 once it is gone."""
    try:
        return sum(_schedstat(f"{pid}/task/{task}")[0] for task in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _schedstat(what: str) -> tuple[int, int]:
    ran, waited, *_ = Path(f"/proc/{what}/schedstat").read_text().split()
    return int(ran), int(waited)


def file_mappings() -> list[tuple[int, int]]:
    """Ranges of this process's addresses that are pages of files: (first, one after the last)."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            first, last = where.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def reset_peak(pid: int | str = "self") -> None:
    """Set the kernel's peak back to what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Watch:
    """Looks again and again at one process from outside, at a few microseconds a look: its files stay open.

    Raises:
        FileNotFoundError: if there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
        self._loadavg = os.open("/proc/loadavg", os.O_RDONLY)
        self._newest: bytes | None = None
        self._descendants: list[int] = []

    def close(self) -> None:
        os.close(self._statm)
        os.close(self._loadavg)

    def resident(self) -> tuple[int, int]:
        """(resident, anonymous) bytes.

        Raises:
            ProcessLookupError: when the process is gone or has given its memory back to end.
        """
        fields = os.pread(self._statm, 256, 0).split()
        total, shared = int(fields[1]), int(fields[2])
        if not total:
            raise ProcessLookupError(f"process {self._pid} has ended")
        return total * _PAGE_BYTES, (total - shared) * _PAGE_BYTES

    def descendants(self) -> list[int]:
        """All descendants that live now.

        Asking costs some 25 µs a thread of the process, so it is done only when a process was born since: the last
        field of /proc/loadavg is the newest process id on the machine.
        """
        newest = os.pread(self._loadavg, 256, 0).rsplit(None, 1)[1]
        if newest != self._newest or self._descendants:
            self._newest, self._descendants = newest, children(self._pid)
        return self._descendants


def children(pid: int) -> list[int]:
    """All descendants of a process that live now."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *children(int(child))]
    except OSError:
        pass
    return found


def waited_for_children(pid: int) -> bool:
    """Whether a process that has ended, and is not reaped yet, had children that it waited for.

    ``False`` if it cannot be told. (/proc/<pid>/stat, fields 11 and 13: page faults of such children.)
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[8]) + int(fields[10]) > 0
    except (OSError, IndexError, ValueError):
        return False


def running(pid: int) -> str | None:
    """The name of a process that lives; ``None`` of one that has ended, whether or not it is reaped."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")
    except OSError:
        return None
    name, _, fields = rest.rpartition(") ")
    return None if fields[:1] in "ZX" else name


def unique_bytes(pid: int) -> int:
    """Memory that only this process holds (USS); 0.4 to 4 ms a look.

    Raises:
        OSError: when the process is gone.
    """
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


def oom_kills() -> int | None:
    """How many processes this machine's kernel has killed for memory since it started."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        return None
    return None
