"""A pytest plug-in that passes durations of steps to pytest-benchmark, for its tables, files and comparisons.

The steps have ended before pytest-benchmark runs. Its timer is a clock that replays the durations measured in the other
process, which excludes all communication from the times.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from membench.records.record import Record


class Clock:
    """A clock that replays measured durations: each ``step`` advances it by the next one."""

    __name__ = "membench_worker_clock"  # the timer's name in the output of pytest-benchmark

    def __init__(self) -> None:
        self._now_s = 0.0
        self._left_s: list[float] = []

    def __call__(self) -> float:
        return self._now_s

    def load(self, durations_s: Sequence[float]) -> None:
        """Set the durations to replay, in seconds."""
        self._left_s = list(durations_s)

    def reset(self) -> None:
        """Set the time to 0."""
        self._now_s = 0.0

    def step(self) -> None:
        """Advance by the next duration."""
        # A profiler calls more steps than were measured.
        self._now_s += self._left_s.pop(0) if self._left_s else 0.0


class _NothingTimed(Exception):
    pass


class Timing:
    """A benchmark of pytest-benchmark, with the clock as its timer."""

    def __init__(self, benchmark: Any, clock: Clock) -> None:
        self._benchmark = benchmark
        self._clock = clock
        self._is_added = False

    def add(self, durations_s: Sequence[float], facts: Mapping[str, Any]) -> None:
        """Add the durations of steps and other facts; only the first call counts, because a test has one row."""
        if self._is_added:
            return
        self._is_added = True
        self._benchmark.extra_info.update(facts)
        if durations_s:
            self._clock.load(durations_s)
            self._benchmark.pedantic(self._clock.step, setup=self._clock.reset, rounds=len(durations_s))
        else:
            # pytest-benchmark marks a benchmark that raises as failed and leaves it out of its files.
            with contextlib.suppress(_NothingTimed):
                self._benchmark.pedantic(_raise)


def _raise() -> None:
    raise _NothingTimed


@pytest.fixture
def _membench_clock(request: pytest.FixtureRequest) -> Clock | None:
    """Return the timer for the benchmark of the fixture ``membench``; it must exist before the benchmark."""
    if "benchmark" in inspect.signature(request.function).parameters:
        return None  # the test uses its benchmark itself
    clock = Clock()
    marker = request.node.get_closest_marker("benchmark")
    request.node.add_marker(
        pytest.mark.benchmark(**{**(marker.kwargs if marker else {}), "timer": clock}), append=False
    )
    return clock


@pytest.fixture
def _membench_timing(_membench_clock: Clock | None, benchmark: Any) -> Timing | None:
    """Pass the durations that the fixture ``membench`` measures to pytest-benchmark."""
    return None if _membench_clock is None else Timing(benchmark, _membench_clock)


def add_case(item: pytest.Item, arguments: dict[str, Any], group: str, records: Sequence[Record]) -> None:
    """Pass the durations of a suite's case to pytest-benchmark, all repeats together.

    Args:
        arguments: the item's fixtures by name, where pytest-benchmark looks for its own.
        group: the group of benchmarks that the case belongs to.
    """
    from pytest_benchmark.fixture import BenchmarkFixture
    from pytest_benchmark.utils import NameWrapper

    from membench.pytest_plugin import outcome

    session = item.config._benchmarksession  # type: ignore[attr-defined]
    clock = Clock()
    timer = NameWrapper(clock)  # type: ignore[no-untyped-call]
    # Created as its fixture does, which is available to test functions only.
    benchmark = BenchmarkFixture(  # type: ignore[no-untyped-call]
        item,
        add_stats=session.benchmarks.append,
        logger=session.logger,
        warner=item.warn,
        disabled=session.disabled,
        **{**session.options, "timer": timer, "group": group},
    )
    arguments["benchmark"] = benchmark
    Timing(benchmark, clock).add(durations_s(records), outcome.figures(records))


def durations_s(records: Sequence[Record]) -> list[float]:
    """Return the durations of the timed steps that figures are derived from; none if a repeat did not complete."""
    from membench.records.disturbance import counted_durations_s
    from membench.records.disturbed_times import counted

    if any(record.status not in ("ok", "diverged") for record in records):
        return []
    return [
        each
        for record in counted(records, "step_median_s")
        for each in counted_durations_s(record.process_of("step_median_s"))
    ]
