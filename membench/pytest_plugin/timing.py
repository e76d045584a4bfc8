"""Times of steps through pytest-benchmark, so that its tables, files and comparisons have them. A plug-in of pytest's.

The steps are over when pytest-benchmark hears of them: its timer is a clock that goes by what the measured process's
own clock has shown, so nothing of the way there and back is in the times.
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
    """Shows durations that were measured elsewhere: ``step`` takes as long as the next one of them."""

    __name__ = "membench_worker_clock"  # as pytest-benchmark writes its timer's name

    def __init__(self) -> None:
        self._now_s = 0.0
        self._left_s: list[float] = []

    def __call__(self) -> float:
        return self._now_s

    def take(self, durations_s: Sequence[float]) -> None:
        self._left_s = list(durations_s)

    def reset(self) -> None:
        self._now_s = 0.0

    def step(self) -> None:
        # A profiler asks for steps that there are no more of.
        self._now_s += self._left_s.pop(0) if self._left_s else 0.0


class _NothingTimed(Exception):
    pass


class Timing:
    """A benchmark of pytest-benchmark and the clock that is its timer."""

    def __init__(self, benchmark: Any, clock: Clock) -> None:
        self._benchmark = benchmark
        self._clock = clock
        self._is_told = False

    def tell(self, durations_s: Sequence[float], facts: Mapping[str, Any]) -> None:
        """Tell it the durations of steps, and what else is known; only the first time counts: a test has one row."""
        if self._is_told:
            return
        self._is_told = True
        self._benchmark.extra_info.update(facts)
        if durations_s:
            self._clock.take(durations_s)
            self._benchmark.pedantic(self._clock.step, setup=self._clock.reset, rounds=len(durations_s))
        else:
            # It marks a benchmark whose function raises as failed, and leaves it out of its files.
            with contextlib.suppress(_NothingTimed):
                self._benchmark.pedantic(_raise)


def _raise() -> None:
    raise _NothingTimed


@pytest.fixture
def _membench_clock(request: pytest.FixtureRequest) -> Clock | None:
    """The timer of the benchmark that the test's fixture ``membench`` uses; it has to be known before that is made."""
    if "benchmark" in inspect.signature(request.function).parameters:
        return None  # the test has a use of its own for its benchmark
    clock = Clock()
    marker = request.node.get_closest_marker("benchmark")
    request.node.add_marker(
        pytest.mark.benchmark(**{**(marker.kwargs if marker else {}), "timer": clock}), append=False
    )
    return clock


@pytest.fixture
def _membench_timing(_membench_clock: Clock | None, benchmark: Any) -> Timing | None:
    """Tells pytest-benchmark the times that the fixture ``membench`` measured."""
    return None if _membench_clock is None else Timing(benchmark, _membench_clock)


def of_case(item: pytest.Item, arguments: dict[str, Any], group: str, records: Sequence[Record]) -> None:
    """Give pytest-benchmark the steps of a suite's case, all repeats together.

    Args:
        arguments: the item's fixtures by name; pytest-benchmark looks there for its own.
        group: the group of benchmarks that the case belongs to.
    """
    from pytest_benchmark.fixture import BenchmarkFixture
    from pytest_benchmark.utils import NameWrapper

    from membench.pytest_plugin import outcome

    session = item.config._benchmarksession  # type: ignore[attr-defined]
    clock = Clock()
    timer = NameWrapper(clock)  # type: ignore[no-untyped-call]
    # As its own fixture makes it, which only functions can have.
    benchmark = BenchmarkFixture(  # type: ignore[no-untyped-call]
        item,
        add_stats=session.benchmarks.append,
        logger=session.logger,
        warner=item.warn,
        disabled=session.disabled,
        **{**session.options, "timer": timer, "group": group},
    )
    arguments["benchmark"] = benchmark
    Timing(benchmark, clock).tell(durations_s(records), outcome.figures(records))


def durations_s(records: Sequence[Record]) -> list[float]:
    """The steps that were timed; none unless every repeat has come to its end."""
    if any(record.status not in ("ok", "diverged") for record in records):
        return []
    return [each for record in records for each in record.processes[0].durations_s or ()]
