"""Estimates of many cases, some at a time."""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from membench.host import environment
from membench.records.record import Record
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.estimate import EstimateJob
from membench.running.needs import Needs
from membench.running.session import silent

_MOST_LANES = 8

Submit = Callable[[EstimateJob], "Future[Record]"]


@contextlib.contextmanager
def lanes(jobs: Sequence[EstimateJob]) -> Iterator[Submit]:
    """Open as many executors as there are cores, and yield what gives a job to the next one that is idle.

    Estimates do not disturb each other, as measurements would: nothing in them is timed.

    Args:
        jobs: those that tell what has to be imported; any of the same model may be given.

    Raises:
        SuiteError: if the options of a model are wrong.
    """
    count = min(environment.usable_cores(), _MOST_LANES)
    with tempfile.TemporaryDirectory(prefix="membench-fit-") as folder, contextlib.ExitStack() as opened:
        idle: queue.SimpleQueue[LocalExecutor] = queue.SimpleQueue()
        needs = Needs.of(jobs, Path(folder))
        for _ in range(count):
            idle.put(opened.enter_context(LocalExecutor(needs, silent)))
        stopped = threading.Event()

        def estimate(job: EstimateJob) -> Record:
            executor = idle.get()
            try:
                if stopped.is_set():
                    raise KeyboardInterrupt
                return executor.measure(job)
            finally:
                idle.put(executor)

        # Executors are closed before the threads end: the kernel ends what a thread started when that ends.
        pool = ThreadPoolExecutor(count)
        try:
            yield lambda job: pool.submit(estimate, job)
        finally:
            stopped.set()
            opened.close()
            pool.shutdown(cancel_futures=True)
