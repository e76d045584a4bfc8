"""Timed steps: on a calm machine as in a user's process, and taken again where other processes disturbed them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from membench.host.load import Others
from membench.records.disturbance import calm_steps
from membench.worker.meter import Meter, Phase
from membench.worker.waiting import Waiting

_T = TypeVar("_T")
_LOOK_S = 0.1
_PARALLEL = 0.01
"""Of a step's duration: where the other threads ran less, it hardly matters how threads wait for each other."""


class TimedSteps:
    """The timed steps of a job, with what disturbed them.

    After each step that was disturbed it waits for other processes to leave the cores, as ``settle`` does before the
    first one. While they do not, threads wait for each other passively.

    Args:
        calm_within_s: how long that waiting, and steps that are taken again, may take in all.
    """

    def __init__(self, meter: Meter, waiting: Waiting, threads: int, calm_within_s: float) -> None:
        self.durations_s: list[float] = []
        self._waited_s: list[float | None] = []
        self._passive: list[bool] = []
        self._meter = meter
        self._waiting = waiting
        self._left_s = calm_within_s
        self._others = Others(threads, meter.family)
        self._is_disturbed = False

    def result(self) -> dict[str, Any]:
        """Return the fields of the worker's result."""
        return {
            "durations_s": self.durations_s,
            "waited_s": self._known_waiting_s(),
            "passive": self._passive if any(self._passive) else None,
            "wait_policy": self._waiting.policy(sum(self._passive), len(self._passive)),
        }

    @contextlib.contextmanager
    def phase(self, prepare: Callable[[], None] = lambda: None) -> Iterator[Phase]:
        """Measure the phase ``time``, whose steps begin once the machine is calm.

        Calm is waited for in the phase, because jobs that run beside this one pause from its begin on. On a GPU it is
        waited for earlier: the energy of the phase includes all that is done in it.

        Args:
            prepare: what needs a calm machine, too, and is no part of the phase's duration and memory.
        """
        if self._meter.on_gpu:
            self.settle()
            prepare()
        with self._meter.phase("time", "default") as phase:
            if not self._meter.on_gpu:
                with self._meter.aside():
                    self.settle()
                    prepare()
            yield phase

    def settle(self) -> None:
        """Wait for calm as long as is left, and let threads wait as in a user's process, or passively without calm."""
        busy = self._others.take_cores()
        while busy is not False and self._others.are_known and self._left_s > 0:
            self._waiting.be_passive()
            began_s = time.monotonic()
            time.sleep(_LOOK_S)
            busy = self._others.take_cores()
            self._left_s -= time.monotonic() - began_s
        if busy or (busy is None and self._is_disturbed):
            self._waiting.be_passive()
        else:
            self._waiting.be_as_users()

    def measure(
        self, step: Callable[[], _T], count: int, *, can_repeat: bool, meet: Callable[[], object] = lambda: None
    ) -> Iterator[_T]:
        """Time steps; yields what each returns.

        Args:
            count: the number of steps.
            can_repeat: whether a step that was disturbed is taken again: not where that changes what is measured later.
            meet: waits for the other ranks, each of which may have waited for calm longer; it precedes each step.
        """
        done = 0
        while done < count:
            if self._is_disturbed:
                self.settle()
            meet()
            others_ran_s = _others_ran_s()
            returned, duration_s, waited_s = self._meter.timed(step)
            is_parallel = _others_ran_s() - others_ran_s > _PARALLEL * duration_s
            self.durations_s.append(duration_s)
            self._waited_s.append(waited_s)
            self._passive.append(self._waiting.is_passive and is_parallel)
            self._is_disturbed = not self._last_is_calm()
            if not self._is_disturbed or not can_repeat or self._left_s <= 0:
                done += 1
            else:
                self._left_s -= duration_s
            yield returned

    def _last_is_calm(self) -> bool:
        waited_s = self._waited_s[-1]
        return bool(calm_steps(self.durations_s[-1:], None if waited_s is None else [waited_s], self._passive[-1:]))

    def _known_waiting_s(self) -> list[float] | None:
        """Return the waiting time of each step in seconds; ``None`` if the kernel did not report one of them."""
        known = [waited_s for waited_s in self._waited_s if waited_s is not None]
        return known if len(known) == len(self._waited_s) else None


def _others_ran_s() -> float:
    """Return for how long all threads but this one have run, in seconds summed."""
    return time.process_time() - time.thread_time()
