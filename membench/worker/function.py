"""Measurement of a user's function, called by the same meter as the steps of a workload."""

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
from membench.errors import summary_with_causes
from membench.host.out_of_memory import is_out_of_memory
from membench.protocol import exceptions, pickling
from membench.protocol.messages import EndedBadly, Result, ResultSoFar
from membench.protocol.requests import MeasureFunction, Rank, Steps
from membench.worker import allocator, device
from membench.worker.garbage import note_on_garbage
from membench.worker.meter import STEPS_FOR_MEMORY, Meter
from membench.worker.numpy_threads import set_numpy_threads
from membench.worker.timed_steps import TimedSteps
from membench.worker.waiting import Waiting

_SKIPPING = ("Skipped", "SkipTest")
"""The names of the exceptions by which pytest and unittest skip a test."""


class _Raised(Exception):
    """The function raised an exception, which has been saved for the caller."""


def measure(work: MeasureFunction, rank: Rank, meter: Meter) -> None:
    """Measure calls of a function in the phases ``warmup``, ``run`` and ``time``.

    The function and its arguments exist before the baseline, so memory that they hold is excluded. The result of a call
    is kept until the next call, so that it counts as held memory.

    Args:
        work: the files to use. ``pickled`` holds the caller's import ``path``, ``folder`` and ``environment``, and its
            ``call`` as nested pickle: function, arguments and keyword arguments. ``raised`` receives an exception of
            the function, as ``protocol.exceptions.Raised``.
    """
    where = rank.device
    if meter.on_gpu:
        device.refuse_missing(where)
    pinned = allocator.pin()
    function, arguments, options = _unpickled(Path(work.pickled))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(rank.threads)
        device.initialize(where)
    set_numpy_threads(rank.blas_threads)
    waiting = Waiting(rank.threads)
    waiting.be_passive()
    timed = TimedSteps(meter, waiting, rank.threads, work.steps.calm_within_s)
    if meter.on_gpu:
        device.announce_gpu(meter, where)
    gc.freeze()  # objects of the caller's modules are not garbage of the function
    calls = _Calls(lambda: function(*arguments, **options), Path(work.raised))
    meter.set_baseline()
    try:
        notes = _measure_phases(calls, meter, work.steps, timed)
    except _Raised as raised:
        error = raised.__cause__
        assert error is not None
        traceback.print_exception(error)  # for the record's output
        status = "out-of-memory" if is_out_of_memory(error) else "failed"
        meter.send(EndedBadly(status, summary_with_causes(error)[:500], meter.current_phase))
        return
    meter.send(ResultSoFar(Result(pinned=pinned, notes=notes, **timed.result())))


def _measure_phases(calls: _Calls, meter: Meter, steps: Steps, timed_calls: TimedSteps) -> list[str]:
    """Measure the phases; return notes on what was measured."""
    with meter.phase("warmup", "pinned"):
        calls.next()
    with meter.phase("run", "pinned") as run:
        for _ in range(STEPS_FOR_MEMORY):
            calls.forget()
            meter.separate_step()
            calls.next()
    allocator.unpin()
    with timed_calls.phase() as timed:
        timed.steps = steps.warmup + steps.measured
        for _ in range(steps.warmup):
            calls.next()
        # How often a function is called may change what it does.
        for _ in timed_calls.measure(calls.next, steps.measured, can_repeat=False):
            pass
    assert run.reading is not None, "the phase has ended"
    return note_on_garbage(meter.most_garbage_bytes, run.reading.live_peak_bytes)


def _unpickled(path: Path) -> Any:
    sent: pickling.FunctionCall = pickle.loads(path.read_bytes())
    sys.path[:] = sent.import_path
    os.chdir(sent.folder)
    os.environ.clear()
    os.environ.update(sent.environment)
    return pickle.loads(sent.call)


class _Calls:
    """Repeated calls of the function, with the result of the latest call kept."""

    def __init__(self, call: Callable[[], Any], raised: Path) -> None:
        self._call = call
        self._raised = raised
        self._returned: Any = None

    def forget(self) -> None:
        """Let go of what the last call returned."""
        self._returned = None

    def next(self) -> None:
        """Call the function.

        Raises:
            plugins.Unsuitable: if the function skips its test.
            _Raised: if the function raises any other exception.
        """
        self.forget()
        try:
            self._returned = self._call()
        except BaseException as error:  # includes SystemExit of sys.exit
            if type(error).__name__ in _SKIPPING:
                raise plugins.Unsuitable(str(error)) from None
            self._save(error)
            raise _Raised from error

    def _save(self, error: BaseException) -> None:
        """Save the exception for the caller, without the frames of this module in its traceback."""
        frames = error.__traceback__
        for _ in range(2):
            frames = frames.tb_next if frames else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        # The process may be killed while it writes.
        partial = self._raised.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(exceptions.Raised(exceptions.sent(error), text)))
        partial.replace(self._raised)
