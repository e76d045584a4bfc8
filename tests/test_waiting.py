"""Which waiting for a core excuses a slow step: that for others, and none for threads and children of one's own."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from membench.host import procfs

_SPIN = "while True: pass"


@pytest.fixture(autouse=True)
def _one_core() -> Iterator[None]:
    """This process on one core, which threads and children that it starts share."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


class _Step(NamedTuple):
    duration_s: float
    used_s: float
    waited_s: float
    excused_s: float


def _measured(step: Callable[[], None]) -> _Step:
    before, began = procfs.cores(), time.perf_counter()
    step()
    duration_s, after = time.perf_counter() - began, procfs.cores()
    if before is None or after is None:
        pytest.skip("this kernel does not tell for how long threads waited")
    used_s, waited_s = after.used_s - before.used_s, after.waited_s - before.waited_s
    return _Step(duration_s, used_s, waited_s, after.waited_for_others_s(before, duration_s, cores=1))


def _work() -> None:
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000)  # other threads run meanwhile


def test_threads_that_wait_for_one_another_are_no_excuse() -> None:
    finished: queue.SimpleQueue[None] = queue.SimpleQueue()
    measured = threading.Event()

    def beside() -> None:
        _work()
        finished.put(None)
        measured.wait()  # a thread that ends takes along what it had waited

    threads = [threading.Thread(target=beside) for _ in range(3)]

    def four_at_once() -> None:
        for thread in threads:
            thread.start()
        _work()
        for _ in threads:
            finished.get()

    step = _measured(four_at_once)
    measured.set()
    assert step.waited_s > step.used_s  # at any moment three wait and one runs, at most
    # What is excused is what others took of this core meanwhile: on a quiet machine next to nothing.
    assert step.excused_s == pytest.approx(step.duration_s - step.used_s, abs=0.001)
    assert step.used_s + step.excused_s < 0.5 * (step.used_s + step.waited_s)


def test_children_of_ones_own_are_no_excuse() -> None:
    with subprocess.Popen([sys.executable, "-c", _SPIN]) as child:
        try:
            time.sleep(0.3)
            step = _measured(_work)
        finally:
            child.kill()
    assert step.waited_s > 0.2 * step.duration_s
    assert step.excused_s == pytest.approx(step.duration_s - step.used_s, abs=0.03)


def test_threads_that_end_meanwhile_do_not_make_the_use_of_cores_unknown() -> None:
    if procfs.cores() is None:
        pytest.skip("this kernel does not tell for how long threads waited")
    found = []
    for _ in range(300):
        executor = concurrent.futures.ThreadPoolExecutor(4)
        list(executor.map(sum, [range(20_000)] * 8))
        executor.shutdown(wait=False)
        found.append(procfs.cores())
    assert None not in found


def test_the_end_of_a_child_is_no_use_of_cores() -> None:
    """What it used in threads that have ended was used when they ran, and not when it is reaped."""
    script = """
import hashlib, threading
thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"a", b"b", 2_000_000))
thread.start(); thread.join()
print(flush=True); input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive = procfs.cores()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        ended = procfs.cores()
        child.wait()
        reaped = procfs.cores()
    if alive is None or ended is None or reaped is None:
        pytest.skip("this kernel does not tell for how long threads waited")
    assert ended.used_s == pytest.approx(alive.used_s, abs=0.1)
    assert reaped.used_s == pytest.approx(alive.used_s, abs=0.1)


def test_a_neighbour_on_the_same_core_is_an_excuse() -> None:
    started = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c '{_SPIN}' >/dev/null & echo $!"], stdout=subprocess.PIPE
    )
    neighbour = int(started.stdout)
    try:
        time.sleep(0.3)
        step = _measured(_work)
    finally:
        os.kill(neighbour, signal.SIGKILL)
    assert step.waited_s > 0.2 * step.duration_s
    assert step.excused_s == pytest.approx(step.waited_s, rel=0.1)
