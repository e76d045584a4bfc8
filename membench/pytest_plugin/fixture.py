"""The fixture ``membench``: a function of the user's, measured in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import pickle
import statistics
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from membench.errors import MembenchError, did_you_mean, summary
from membench.host import environment
from membench.host.device import Device
from membench.protocol import pickling
from membench.pytest_plugin import entries, executing, marker, outcome
from membench.pytest_plugin.readable import ByteSize, Duration
from membench.pytest_plugin.sharing import FUNCTIONS, Sharing
from membench.pytest_plugin.timing import durations_s
from membench.records.encoding import as_json
from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.running.jobs.function import FunctionJob
from membench.running.needs import Needs
from membench.running.session import run_header
from membench.suite.schema import Settings
from membench.units import BYTES, SECONDS, Unit

if TYPE_CHECKING:
    from membench.pytest_plugin.timing import Timing

_READABLE: Mapping[Unit, Callable[[float], Any]] = {BYTES: ByteSize, SECONDS: Duration}

_WORTH_IMPORTING_ONCE = ("numpy", "torch", "transformers")
"""Where test modules have imported them, functions will need them, and each process would import them anew."""


class Result:
    """What a function took. Each metric of a record is an attribute; sizes and durations compare with text.

    Attributes:
        record: all that was measured, with how each figure was obtained; of several repeats, in the first.
        records: that of each repeat. Figures are medians over them.
        peak_live: most memory in use at once during a call, above what was there before the first.
        held_live: memory still in use after a call, what it returned included.
        peak_footprint: most memory taken from the machine during a call under the default allocator.
        held_footprint: memory still taken from the machine after one.
        time: median duration of a call.
    """

    record: Record
    records: tuple[Record, ...]
    peak_live: ByteSize
    held_live: ByteSize
    peak_footprint: ByteSize
    held_footprint: ByteSize
    time: Duration

    def __init__(self, records: Sequence[Record], name: str) -> None:
        self.records = tuple(records)
        self.record = self.records[0]
        self._name = name

    def __getattr__(self, name: str) -> Any:
        __tracebackhide__ = True
        if name.startswith("_") or name in ("record", "records"):  # asked for by whoever copies a result
            raise AttributeError(name)
        metric = next((metric for metric in METRICS if metric.name == name), None)
        if metric is None:
            hint = did_you_mean(name, (metric.name for metric in METRICS if metric.field in self.record.metrics))
            raise AttributeError(f"a result has no '{name}'; {hint}")
        values = [value for record in self.records if (value := record.metrics.get(metric.field)) is not None]
        if not values:
            reason = self.record.reasons.get(metric.field, "a function has no such figure")
            raise MembenchError(f"{name} of {self._name} is not known: {reason}")
        value = statistics.median(values)
        readable = _READABLE.get(metric.unit)
        return readable(value) if readable else value

    def __repr__(self) -> str:
        return f"membench({self._name})"


class MembenchFixture:
    """Measures functions for one test."""

    def __init__(self, request: pytest.FixtureRequest, timing: Timing | None) -> None:
        self._request = request
        self._item: pytest.Item = request.node
        self._timing = timing
        self._demands = marker.demands(self._item)
        self._count = 0

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Result:
        """Call a function with these arguments, twelve times, in a process of its own, and say what it took.

        With ``repeats`` in the test's marker all that is done so many times, each time in a new process.

        The function may be a lambda or a local one. What it and its arguments hold is in no figure. Module, class and
        closure come along by value: what it changes in them is not seen here.

        Raises:
            Exception: whatever the function raises, with its traceback as a note. The test fails if the process
                dies, or takes longer than ten minutes.
        """
        __tracebackhide__ = True
        name = getattr(function, "__qualname__", None) or type(function).__name__
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            _fail(f"'{name}' does nothing when it is called; give membench a function that goes through it to its end")
        self._count += 1
        records, worse = self._measured(function, args, kwargs, name)
        if records[-1].status == "skipped":
            pytest.skip(str(records[-1].message))
        wrong = [*(line for record in records for line in outcome.complaints(record)), *worse]
        if wrong:
            outcome.add_output(self._item, records)
            _fail("\n".join(dict.fromkeys(wrong)))
        return Result(records, name)

    def _measured(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str
    ) -> tuple[list[Record], list[str]]:
        """A record a repeat, up to one that did not end well, and what is worse in them than before."""
        __tracebackhide__ = True
        sharing, device = Sharing.of(self._item.config), self._demands.device
        pickled, raised = sharing.passing("call"), sharing.passing("raised")
        caller = _Caller.of(self._item.config, device)
        limits = {} if self._demands.limit_bytes is None else {"peak_live_bytes": self._demands.limit_bytes}
        try:
            given = pickling.as_bytes((function, args, kwargs), by_value=self._of_tests())
        except Exception as error:
            what = f"'{name}' or an argument cannot be sent to a process of its own: {summary(error)}"
            raise pytest.fail.Exception(what) from None
        here = {"path": sys.path, "folder": str(Path.cwd()), "environment": caller.environment(), "call": given}
        pickled.write_bytes(pickle.dumps(here))
        try:
            job = FunctionJob(
                **self._names(),
                repeat=0,
                device=Device.parse(device),
                limits=limits,
                settings=caller.settings,
                pickled=pickled,
                raised=raised,
            )
            records: list[Record] = []
            while len(records) < self._demands.repeats and all(record.status == "ok" for record in records):
                records.append(caller.measure(job, len(records)))
                self._keep(records[-1])
            self._tell(records)
            if raised.exists():
                raise _raised(raised)
            return records, self._worse(records, lambda repeat: caller.measure(job, repeat))
        finally:
            pickled.unlink(missing_ok=True)
            raised.unlink(missing_ok=True)

    def _of_tests(self) -> list[types.ModuleType]:
        """Modules that a process of its own could not import, because pytest does that in ways of its own."""
        plugins = self._item.config.pluginmanager.get_plugins()
        conftests = [plugin for plugin in plugins if isinstance(plugin, types.ModuleType) and _is_conftest(plugin)]
        return [self._request.module, *conftests]

    def _names(self) -> dict[str, str]:
        file, _, test = self._item.nodeid.partition("::")
        again = "" if self._count == 1 else f"#{self._count}"
        return {
            "id": f"{self._item.nodeid}{again}",
            "model": file,
            "workload": f"{test}{again}",
        }

    def _worse(self, records: Sequence[Record], measure: Callable[[int], Record]) -> list[str]:
        __tracebackhide__ = True
        if self._item.config.getoption("membench_compare") is None or records[-1].status != "ok":
            return []
        from membench.pytest_plugin.judging import Judge

        def again(repeat: int) -> Record:
            more = measure(repeat)
            self._keep(more)
            return more

        try:
            judge = Judge.of(self._item.config)
            assert judge is not None
            return judge.complaints(self._item, FUNCTIONS, records, self._demands.tolerances, again)
        except MembenchError as error:
            raise pytest.fail.Exception(f"membench: {error}") from None

    def _keep(self, record: Record) -> None:
        # Of no devices: other tests of the same file's may be on others.
        header = run_header(FUNCTIONS, "", [], Sharing.of(self._item.config).started)
        entries.add(self._item, header, as_json(record))

    def _tell(self, records: Sequence[Record]) -> None:
        """Tell others what the test's report and pytest-benchmark are to show."""
        outcome.add_figures(self._item, records, "" if self._count == 1 else f"{self._count}.")
        if self._timing is not None:
            self._timing.tell(durations_s(records), outcome.figures(records))


class _Caller:
    """What all functions of a pytest run that are on one device are measured with."""

    def __init__(self, config: pytest.Config, device: str) -> None:
        sharing = Sharing.of(config)
        self.settings = Settings.model_validate({})
        self._gpu = sharing.gpu([device])
        known = [name for name in _WORTH_IMPORTING_ONCE if name in sys.modules]
        needs = Needs(
            (Device.parse(device),),
            environment.usable_cores(),
            sharing.folder,
            ("membench.protocol.pickling", "membench.worker.main", *known),
            self._gpu.variables,
        )
        self._executor = executing.opened(config, needs)
        config.add_cleanup(lambda: self._executor.__exit__(None, None, None))

    @classmethod
    def of(cls, config: pytest.Config, device: str) -> _Caller:
        callers = config.stash.setdefault(_CALLERS, {})
        if device not in callers:
            callers[device] = cls(config, device)
        return callers[device]

    def environment(self) -> dict[str, str]:
        """The test's environment now, with what the harness sets in it."""
        threads = environment.usable_cores()
        return {**environment.worker_environment(threads), **self._gpu.variables}

    def measure(self, job: FunctionJob, repeat: int) -> Record:
        with self._gpu.held:
            return self._executor.measure(dataclasses.replace(job, repeat=repeat))


_CALLERS = pytest.StashKey[dict[str, _Caller]]()


def _is_conftest(module: types.ModuleType) -> bool:
    return Path(getattr(module, "__file__", None) or "").name == "conftest.py"


def _raised(path: Path) -> BaseException:
    """The exception that a function raised in its process, with its traceback there as a note."""
    pickled, text = pickle.loads(path.read_bytes())
    error: Any = None
    with contextlib.suppress(Exception):  # it could not be sent, or cannot be made again from what was
        error = pickle.loads(pickled)
    if not isinstance(error, BaseException):
        error = MembenchError(text.strip().rpartition("\n")[2])
    made: BaseException = error
    made.add_note(f"\nin the measured process:\n{text.rstrip()}")
    return made


def _fail(message: str) -> NoReturn:
    __tracebackhide__ = True
    pytest.fail(message)
