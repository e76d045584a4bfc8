"""Inside the measured process: a function of the user's, called under the same meter as the steps of a workload."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from membench import plugins
from membench.errors import is_out_of_memory, summary
from membench.protocol import pickling
from membench.protocol.messages import EndedBadly, Result, ResultSoFar
from membench.protocol.requests import MeasureFunction, Rank, Steps
from membench.worker import allocator, device
from membench.worker.meter import STEPS_FOR_MEMORY, Meter, Timing

_SKIPPING = ("Skipped", "SkipTest")
"""By which pytest and unittest skip a test."""


class _Raised(Exception):
    """The function raised something, which has been left for the caller."""


def measure(work: MeasureFunction, rank: Rank, meter: Meter) -> None:
    """Measure calls in the phases ``warmup``, ``run`` and ``time``; nothing is loaded or converted before them.

    Function and arguments are there before the baseline, so what they hold is in no figure. What a call returns is
    kept until the next one, so that it counts as held.

    Args:
        work: ``pickled``: a file of the caller's ``path`` (of modules), ``folder`` and ``environment``, and as bytes
            of their own its ``call``: function, arguments and keyword arguments. ``raised``: where an exception of the
            function goes, as bytes of its own or ``None``, beside the text of its traceback.
    """
    where = rank.device
    if meter.on_gpu:
        device.refuse_missing(where)
    pinned = allocator.pin()
    function, arguments, options = _unpickled(Path(work.pickled))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(rank.threads)
        device.wake(where)
    if meter.on_gpu:
        device.announce_gpu(meter, where)
    gc.freeze()  # what the caller's modules made is no garbage of the function's
    calls = _Calls(lambda: function(*arguments, **options), Path(work.raised))
    meter.set_baseline()
    try:
        durations_s, waited_s = _gone_through(calls, meter, work.steps)
    except _Raised as raised:
        error = raised.__cause__
        assert error is not None
        status = "out-of-memory" if is_out_of_memory(error) else "failed"
        meter.tell(EndedBadly(status, summary(error)[:500]))
        return
    meter.tell(ResultSoFar(Result(pinned=pinned, durations_s=durations_s, waited_s=waited_s)))


def _gone_through(calls: _Calls, meter: Meter, steps: Steps) -> tuple[list[float], list[float] | None]:
    """The phases; how long the timed calls took, and what of it they waited for a core."""
    with meter.phase("warmup", "pinned"):
        calls.next()
    with meter.phase("run", "pinned"):
        for _ in range(STEPS_FOR_MEMORY):
            calls.next()
    allocator.unpin()
    timing = Timing()
    with meter.phase("time", "default") as timed:
        timed.steps = steps.warmup + steps.measured
        for _ in range(steps.warmup):
            calls.next()
        for _ in range(steps.measured):
            timing.take_up(meter.timed(calls.next))
    return timing.durations_s, timing.waited_s


def _unpickled(path: Path) -> Any:
    given = pickle.loads(path.read_bytes())
    sys.path[:] = given["path"]
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    return pickle.loads(given["call"])


class _Calls:
    def __init__(self, call: Callable[[], Any], raised: Path) -> None:
        self._call = call
        self._raised = raised
        self._returned: Any = None

    def next(self) -> None:
        self._returned = None
        try:
            self._returned = self._call()
        except BaseException as error:  # sys.exit, too
            if type(error).__name__ in _SKIPPING:
                raise plugins.Unsuitable(str(error)) from None
            self._keep(error)
            raise _Raised from error

    def _keep(self, error: BaseException) -> None:
        """Leave the exception for the caller; the frames of this module are not part of its traceback."""
        frames = error.__traceback__
        for _ in range(2):
            frames = frames.tb_next if frames else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        try:
            pickled = pickling.as_bytes(error.with_traceback(None), by_value=())
        except Exception:  # it holds what cannot be sent; its text can
            pickled = None
        self._raised.write_bytes(pickle.dumps((pickled, text)))
