"""Read and reset a process's memory figures through /proc (Linux). No torch, no state."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LONGEST_RANK = 6
_PAGES_WORTH_A_LOOK = 2**18 // _PAGE_BYTES


@dataclass(frozen=True)
class Resident:
    """Resident memory at one moment, in bytes.

    Attributes:
        private_bytes: pages that belong to no file and to this process alone, or to it and its forks.
        shared_bytes: shared pages that belong to no file on a disk: mappings without a file, and files in memory.
        file_bytes: pages of files on a disk, which the kernel can drop and read again.
        peak_bytes: the kernel's own peak of all pages since the last reset.
    """

    private_bytes: int
    shared_bytes: int
    file_bytes: int
    peak_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.private_bytes + self.shared_bytes + self.file_bytes


def resident(pid: int | str = "self") -> Resident:
    """Read resident memory from /proc/<pid>/status."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[key] = int(value.split()[0]) * 1024
    return Resident(found["RssAnon"], found["RssShmem"], found["RssFile"], found["VmHWM"])


def files_in_memory_bytes() -> int:
    """Return the resident bytes of files that this process maps, and that lie in memory (tmpfs) anyway.

    Deleted files and files in /dev/shm are left out: a program uses them as shared memory. Takes some milliseconds.
    """
    in_memory = _devices_in_memory()
    found, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if " " in key:  # the first line of a mapping: addresses, flags, offset, device, inode and path
            device, _, *path = line.split(maxsplit=5)[3:]
            name = path[0] if path else ""
            is_shared = name.startswith(("/dev/shm/", "/memfd:", "/SYSV")) or name.endswith(" (deleted)")
            is_file = name.startswith("/") and not is_shared and device in in_memory
        elif is_file and key == "Rss":
            found += int(value.split()[0]) * 1024
    return found


def _devices_in_memory() -> set[str]:
    """Return the devices of file systems in memory, as /proc/<pid>/maps names them: in hexadecimal."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if "tmpfs" in fields[fields.index("-") + 1]:
            found.add(":".join(f"{int(part):02x}" for part in fields[2].split(":")))
    return found


def counted_page_by_page() -> tuple[int, int] | None:
    """Count this process's pages in its page tables; ``None`` if the kernel does not offer it. Takes some 3 ms a GiB.

    The counters in /proc/self/status may be off by some hundred kB, as each core keeps a part of them to itself.

    Returns:
        the private anonymous bytes, and the shared bytes of no file on a disk, each page divided by the number of
        processes that map it.
    """
    found: dict[str, int] = {}
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("Anonymous", "Pss_Shmem"):
                found[key] = int(value.split()[0]) * 1024
    except OSError:
        return None
    return (found["Anonymous"], found["Pss_Shmem"]) if len(found) == 2 else None


def page_faults() -> int:
    """Return how many page faults the threads of this process have had, ended threads included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def program_break_at_start() -> int:
    """Return the address at which the heap of this process begins."""
    return int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[44])


def resident_in(first: int, last: int) -> int:
    """Return the resident bytes of this process between two addresses."""
    begin, end = first // _PAGE_BYTES, -(-last // _PAGE_BYTES)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(begin * 8)
        entries = pagemap.read((end - begin) * 8)
    return entries[7::8].translate(_IS_RESIDENT).count(1) * _PAGE_BYTES


_IS_RESIDENT = bytes(value >= 128 for value in range(256))
"""By the highest byte of an entry of pagemap: bit 63 says that the page is resident."""


@dataclass(frozen=True)
class Cores:
    """The use of cores by this process since it began, in seconds summed over threads.

    Attributes:
        waited_s: time in which threads were ready to run and had no core; of the threads that exist now.
        used_s: time in which threads ran, including ended threads, descendants and sibling ranks.
    """

    waited_s: float
    used_s: float

    def waited_for_others_s(self, earlier: Cores, duration_s: float, cores: int) -> float:
        """Return how much of the waiting since ``earlier`` other processes can have caused.

        That is no more than the time in which cores were not used by this process: while it has all cores, its threads
        wait for one another only.

        Args:
            cores: how many this process may use.
        """
        waited_s = self.waited_s - earlier.waited_s  # the waiting of ended threads is not known
        not_ours_s = cores * duration_s - (self.used_s - earlier.used_s)
        return max(0.0, min(waited_s, not_ours_s))


def cores(family: int | None = None) -> Cores | None:
    """Read this process's use of cores from /proc/<pid>/task/<tid>/schedstat; ``None`` if the kernel has none.

    Args:
        family: the process whose descendants belong together, so that cores that they use are not lost to strangers.
            Without one it is this process.
    """
    own = os.getpid()
    waited_ns = threads_waited_ns(own)
    if not waited_ns:
        return None
    used_s = sum(_of_all_threads_s(pid) for pid in children(family or own) if pid != own)
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cores(sum(waited_ns.values()) / 1e9, time.process_time() + used_s + reaped.ru_utime + reaped.ru_stime)


def threads_waited_ns(pid: int) -> dict[str, int]:
    """Return for how long each living thread of a process was ready to run and had no core, by id.

    Empty if the process is gone, or if the kernel does not report it.
    """
    found = {}
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
                found[task] = int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return {}
    return found


def _of_all_threads_s(pid: int) -> float:
    """Return how long the threads of a process ran, ended threads included, in seconds; 0 if it is gone.

    Whatever is left out here would seem to be used at once when the process is reaped.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) returns it
    except OSError:
        pass
    try:  # one that has ended, and is not reaped yet, has no clock
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def file_mappings() -> list[tuple[int, int]]:
    """Return the address ranges of this process that map files, as (first, one after the last)."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            first, last = where.split("-")
            found.append((int(first, 16), int(last, 16)))
    return found


def writable_mappings() -> Iterator[tuple[int, int]]:
    """Yield the address ranges of private memory of no file that can be written, as (first, one after the last).

    It keeps no object for each mapping, as that would change the memory that is looked at.
    """
    with open("/proc/self/maps", "rb") as mappings:
        for line in mappings:
            where, flags, _, _, inode, *_ = line.split(maxsplit=5)
            if flags == b"rw-p" and inode == b"0":
                first, last = where.split(b"-")
                yield int(first, 16), int(last, 16)


def loaded_libraries(name: str) -> list[str]:
    """Return the files with a name in their file name that this process maps, such as shared libraries, sorted."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = (fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6)
    return sorted({file for file in files if name in os.path.basename(file)})


def reset_peak(pid: int | str = "self") -> None:
    """Reset the kernel's peak to the current resident memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Watch:
    """Repeated readings of one process from outside, at a few microseconds each, because its files stay open.

    Raises:
        FileNotFoundError: if there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
        self._not_private_pages = self._shared_pages = 0
        self._loadavg = os.open("/proc/loadavg", os.O_RDONLY)
        self._newest: bytes | None = None
        self._descendants: list[int] = []

    def close(self) -> None:
        os.close(self._statm)
        os.close(self._loadavg)

    def resident(self) -> tuple[int, int]:
        """Return (resident, anonymous) bytes, with shared memory among the anonymous.

        Raises:
            ProcessLookupError: if the process is gone, or is ending and has no memory any more.
        """
        fields = os.pread(self._statm, 256, 0).split()
        total, not_private = int(fields[1]), int(fields[2])
        if not total:
            raise ProcessLookupError(f"process {self._pid} has ended")
        # How much of it is shared memory stands in a file that takes longer to read.
        if abs(not_private - self._not_private_pages) > _PAGES_WORTH_A_LOOK:
            self._not_private_pages = not_private
            with contextlib.suppress(OSError, KeyError):
                self._shared_pages = resident(self._pid).shared_bytes // _PAGE_BYTES
        anonymous = total - not_private + min(self._shared_pages, not_private)
        return total * _PAGE_BYTES, anonymous * _PAGE_BYTES

    def descendants(self) -> list[int]:
        """Return all living descendants.

        Looking costs some 25 µs a thread of the process, so it is done only if a process has started since: the last
        field of /proc/loadavg is the newest process id on the machine.
        """
        newest = os.pread(self._loadavg, 256, 0).rsplit(None, 1)[1]
        if newest != self._newest or self._descendants:
            self._newest, self._descendants = newest, children(self._pid)
        return self._descendants


def children(pid: int) -> list[int]:
    """Return all living descendants of a process."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *children(int(child))]
    except OSError:
        pass
    return found


def rank_of(pid: int) -> int | None:
    """Return the rank that the environment of a process names (``RANK``); ``None`` without one, or if it is gone."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    written = next((each.removeprefix(b"RANK=") for each in variables if each.startswith(b"RANK=")), b"")
    return int(written) if written.isdigit() and len(written) <= _LONGEST_RANK else None


def waited_for_children(pid: int) -> bool:
    """Return whether a process that has ended, and is not reaped yet, had children that it waited for.

    ``False`` if that is not known. (/proc/<pid>/stat, fields 11 and 13: page faults of such children.)
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[8]) + int(fields[10]) > 0
    except (OSError, IndexError, ValueError):
        return False


def running(pid: int) -> str | None:
    """Return the name of a living process; ``None`` if it has ended, reaped or not."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")
    except OSError:
        return None
    name, _, fields = rest.rpartition(") ")
    return None if fields[:1] in "ZX" else name


def named(pids: Iterable[int]) -> list[str]:
    """Return names and ids of those processes that have not ended."""
    return [f"{name} (process {pid})" for pid in pids if (name := running(pid)) is not None]


def unique_bytes(pid: int) -> int:
    """Return the memory that only this process holds (USS). Takes 0.4 to 4 ms.

    Raises:
        OSError: if the process is gone.
    """
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for lack of memory since it started; ``None`` if not known."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        return None
    return None


def is_in_memory(folder: Path) -> bool:
    """Return whether files in a folder take memory instead of a disk."""
    at, kind = Path("/"), ""
    try:
        own, mounts = folder.resolve(), Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    for line in mounts:
        _, place, type_of, *_ = line.split()
        mounted = Path(place.encode().decode("unicode_escape"))  # a blank is written \040
        if own.is_relative_to(mounted) and len(mounted.parts) >= len(at.parts):
            at, kind = mounted, type_of  # the last one mounted at a place is seen
    return kind in ("tmpfs", "ramfs")
