"""How the threads of a parallel operation wait for each other: as in a user's process, or passively.

At each barrier OpenMP's threads spin for some milliseconds before they sleep. On a quiet machine that makes small
operations up to twice as fast; while other processes use the cores it makes them many times slower. libgomp reads the
policy (``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``) once, when it is loaded, but it also counts the threads of all its
teams: while there are more of them than cores, it hardly spins. So an idle thread that owns a team of its own makes all
others wait passively, and they wait as before when it has ended.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import time
from collections.abc import Mapping

from membench.host import procfs
from membench.host.environment import WAIT_POLICY_VARIABLES

LIBRARY = "libgomp"
"""In the file names of GNU's OpenMP; torch and scikit-learn bring their own, each."""

_LARGEST_TEAM = 64
"""On a machine of more cores a small team cannot be made to wait passively: that would take as many threads."""
_LONGEST_ENDING_S = 1.0


class _IdleTeam:
    """A thread that owns a team of threads of a libgomp and does nothing."""

    def __init__(self, library: str, size: int) -> None:
        run = ctypes.CDLL(library).GOMP_parallel
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        # What each of its threads is to do: free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._size = size
        self._ended, started = _thread.allocate_lock(), _thread.allocate_lock()
        self._ended.acquire()
        started.acquire()

        def own_a_team() -> None:
            run(nothing, None, size, 0)
            started.release()
            self._ended.acquire()

        _thread.start_new_thread(own_a_team, ())
        started.acquire()

    def end(self) -> None:
        """End its threads; libgomp no longer counts them when this returns."""
        left = _threads() - self._size
        self._ended.release()
        deadline = time.monotonic() + _LONGEST_ENDING_S
        while _threads() > left and time.monotonic() < deadline:
            time.sleep(0.0001)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_passively() -> None:
    """Let threads of this process wait passively until it ends; for processes in which nothing is timed."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    Waiting(int(threads) if threads.isdecimal() else os.cpu_count() or 1).be_passive()


class Waiting:
    """The switch between waiting as in a user's process, which is how it begins, and waiting passively.

    A policy that the user has set is kept: then nothing is switched. Other libraries than libgomp are not switched.

    Args:
        threads: the number of threads of parallel operations; a single one waits for none.
    """

    def __init__(self, threads: int, environment: Mapping[str, str] = os.environ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._size = max(2, cores - threads + 2)
        self._threads = threads
        self._set = [f"{name}={environment[name]}" for name in WAIT_POLICY_VARIABLES if name in environment]
        self._teams: dict[str, _IdleTeam] = {}

    @property
    def is_passive(self) -> bool:
        """Whether threads wait passively now, and would not in a user's process."""
        return bool(self._teams)

    def be_passive(self) -> None:
        """Let threads wait passively, those of libraries that were loaded since the last call included."""
        if self._threads < 2 or self._set or self._size > _LARGEST_TEAM:
            return
        for library in procfs.loaded_libraries(LIBRARY):
            if library not in self._teams:
                self._teams[library] = _IdleTeam(library, self._size)

    def be_as_users(self) -> None:
        """Let threads wait as in a user's process."""
        while self._teams:
            self._teams.popitem()[1].end()

    def policy(self, passive_steps: int, steps: int) -> str:
        """Describe how threads waited in timed steps, and why.

        Args:
            passive_steps: the number of steps in which they waited passively.
        """
        if self._threads < 2:
            return "one thread"
        if self._set:
            return f"threads wait as {', '.join(self._set)} says"
        if not passive_steps:
            return "threads wait as in a user's process"
        some = "" if passive_steps == steps else f" in {passive_steps} of {steps} steps"
        return f"threads wait passively{some}: other processes used the cores"
