"""The fixture ``membench``: measures a user's function in a separate process."""

from __future__ import annotations

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
from membench.host.code_version import CodeVersion, code_version
from membench.host.device import Device
from membench.protocol import pickling
from membench.pytest_plugin import entries, executing, marker, outcome, raising
from membench.pytest_plugin.readable import ByteSize, Duration
from membench.pytest_plugin.sharing import FUNCTIONS, Sharing
from membench.pytest_plugin.timing import durations_s
from membench.records.encoding import as_json
from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.running.jobs.function import PRELOADED, FunctionJob
from membench.running.needs import Needs
from membench.running.session import run_header
from membench.suite.schema import Settings
from membench.units import BYTES, SECONDS, Unit

if TYPE_CHECKING:
    from membench.pytest_plugin.timing import Timing

_READABLE: Mapping[Unit, Callable[[float], Any]] = {BYTES: ByteSize, SECONDS: Duration}

_PRELOADED_IF_USED = ("numpy", "torch", "transformers")
"""Modules to preload if test modules have imported them: functions need them, and each process would import them."""


class Result:
    """The measurements of a function. Each metric of a record is an attribute; sizes and durations compare with text.

    Attributes:
        record: the record of the first repeat, with the source of each figure.
        records: the records of all repeats. DerivedMetrics are medians over them.
        peak_live: peak of live memory during a call, above the memory in use before the first call.
        held_live: live memory after a call, its return value included.
        peak_footprint: peak of memory taken from the machine during a call under the default allocator.
        held_footprint: memory taken from the machine after a call.
        time: median duration of a call.

    Raises:
        AttributeError: for a metric that does not exist.
        MembenchError: for a metric whose value is unknown.
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
        if name.startswith("_") or name in ("record", "records"):  # looked up when a result is copied
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
        self._options = marker.options_of(self._item)
        self._count = 0

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Result:
        """Call a function with arguments twelve times in a separate process, and return its measurements.

        ``repeats`` in the test's marker repeats the measurement, each time in a new process.

        The function may be a lambda or a local function. Memory already held by the function and its arguments is
        excluded. The module, class and closure of the function are copied: its changes to them have no effect here.

        Raises:
            Exception: the exception of the function, with its attributes and causes. The test fails if the process
                dies or takes longer than ten minutes.
        """
        __tracebackhide__ = True
        name = getattr(function, "__qualname__", None) or type(function).__name__
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            _fail(f"'{name}' does nothing when it is called; give membench a function that goes through it to its end")
        self._count += 1
        records, regressions = self._measure(function, args, kwargs, name)
        if records[-1].status == "skipped":
            pytest.skip(str(records[-1].message))
        failures = [*(line for record in records for line in outcome.failures(record)), *regressions]
        if failures:
            outcome.add_output(self._item, records)
            _fail("\n".join(dict.fromkeys(failures)))
        return Result(records, name)

    def _measure(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], name: str
    ) -> tuple[list[Record], list[str]]:
        """Return the records of all repeats, up to the first failed one, and messages for regressions."""
        __tracebackhide__ = True
        sharing, device = Sharing.of(self._item.config), self._options.device
        pickled, raised = sharing.new_file("call"), sharing.new_file("raised")
        executor = _FunctionExecutor.of(self._item.config, device)
        limits = {} if self._options.limit_bytes is None else {"peak_live_bytes": self._options.limit_bytes}
        try:
            call = pickling.as_bytes((function, args, kwargs), by_value=self._modules_by_value())
        except Exception as error:
            what = f"'{name}' or an argument cannot be sent to a process of its own: {summary(error)}"
            raise pytest.fail.Exception(what) from None
        sent = pickling.FunctionCall(tuple(sys.path), str(Path.cwd()), executor.environment(), call)
        pickled.write_bytes(pickle.dumps(sent))
        try:
            job = FunctionJob(
                **self._names(),
                repeat=0,
                device=Device.parse(device),
                limits=limits,
                settings=executor.settings,
                pickled=pickled,
                raised=raised,
            )
            records: list[Record] = []
            while len(records) < self._options.repeats and all(record.status == "ok" for record in records):
                records.append(executor.measure(job, len(records)))
                self._keep(records[-1])
            self._report(records)
            if raised.exists():
                raise raising.loaded(raised, self._item)
            return records, self._regressions(records, lambda repeat: executor.measure(job, repeat))
        finally:
            pickled.unlink(missing_ok=True)
            raised.unlink(missing_ok=True)

    def _modules_by_value(self) -> list[types.ModuleType]:
        """Return the modules that only pytest can import: they are pickled by value."""
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

    def _regressions(self, records: Sequence[Record], measure: Callable[[int], Record]) -> list[str]:
        __tracebackhide__ = True
        if self._item.config.getoption("membench_compare") is None or records[-1].status != "ok":
            return []
        from membench.pytest_plugin.judging import Judge

        def measure_again(repeat: int) -> Record:
            more = measure(repeat)
            self._keep(more)
            return more

        try:
            judge = Judge.of(self._item.config)
            assert judge is not None
            return judge.failures(self._item, FUNCTIONS, records, self._options.tolerances, measure_again)
        except MembenchError as error:
            raise pytest.fail.Exception(f"membench: {error}") from None

    def _keep(self, record: Record) -> None:
        # Without devices: other tests of the same file may use other devices.
        config = self._item.config
        if (code := config.stash.get(_CODE, None)) is None:
            code = config.stash[_CODE] = code_version(config.rootpath)
        header = run_header(FUNCTIONS, "", [], Sharing.of(config).started, code)
        entries.add(self._item, header, as_json(record))

    def _report(self, records: Sequence[Record]) -> None:
        """Add figures to the test's report and to pytest-benchmark."""
        outcome.add_figures(self._item, records, "" if self._count == 1 else f"{self._count}.")
        if self._timing is not None:
            self._timing.add(durations_s(records), outcome.figures(records))


_CODE = pytest.StashKey[CodeVersion]()


class _FunctionExecutor:
    """The executor and the settings for all functions of a pytest run on one device."""

    def __init__(self, config: pytest.Config, device: str) -> None:
        sharing = Sharing.of(config)
        self.settings = Settings.model_validate({})
        self._gpu = sharing.gpu([device])
        known = [name for name in _PRELOADED_IF_USED if name in sys.modules]
        needs = Needs(
            (Device.parse(device),),
            environment.usable_cores(),
            sharing.folder,
            (*PRELOADED, *known),
            self._gpu.variables,
        )
        self._executor = executing.open_executor(config, needs)
        config.add_cleanup(lambda: self._executor.__exit__(None, None, None))

    @classmethod
    def of(cls, config: pytest.Config, device: str) -> _FunctionExecutor:
        """Return the executor for a device, created on first use."""
        executors = config.stash.setdefault(_EXECUTORS, {})
        if device not in executors:
            executors[device] = cls(config, device)
        return executors[device]

    def environment(self) -> dict[str, str]:
        """Return the test's current environment with the variables set by the harness."""
        threads = environment.usable_cores()
        return {**environment.worker_environment(threads), **self._gpu.variables}

    def measure(self, job: FunctionJob, repeat: int) -> Record:
        """Measure a repeat of a job."""
        with self._gpu.held:
            return self._executor.measure(dataclasses.replace(job, repeat=repeat))


_EXECUTORS = pytest.StashKey[dict[str, _FunctionExecutor]]()


def _is_conftest(module: types.ModuleType) -> bool:
    return Path(getattr(module, "__file__", None) or "").name == "conftest.py"


def _fail(message: str) -> NoReturn:
    __tracebackhide__ = True
    pytest.fail(message)
