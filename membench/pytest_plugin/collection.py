"""Collection of suites as test files, with one test per case."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from membench.host.device import Device
from membench.pytest_plugin import entries
from membench.pytest_plugin.sharing import FUNCTIONS, Sharing

if TYPE_CHECKING:
    from membench.host.code_version import CodeVersion
    from membench.protocol.case import Case
    from membench.records.record import Record
    from membench.running.executors.executor import Executor
    from membench.running.jobs.runnable import RunnableJob
    from membench.running.losses import KnownLosses
    from membench.suite.suite import Suite

_MAKES_SUITE = re.compile(r"^[^#\n]*\bSuite\s*\(", re.MULTILINE)
_SUITE_TABLE = re.compile(r"^\s*\[\s*suite\s*\]", re.MULTILINE)
_LARGEST_SUITE_BYTES = 2**20


def suite_file(path: Path, parent: pytest.Collector) -> SuiteFile | None:
    """Return the collector for a file if it is a suite to collect; a suite in Python must be named by the user."""
    is_named = parent.session.isinitpath(path)
    if not is_named and not Sharing.of(parent.config).finds_suites:
        return None
    if path.suffix == ".py":
        is_suite = _makes_suite(path, any(path.match(each) for each in parent.config.getini("python_files")))
    else:
        is_suite = _is_suite(path, is_named)
    return SuiteFile.from_parent(parent, path=path) if is_suite else None


def _makes_suite(path: Path, is_tests: bool) -> bool:
    """Whether a Python file mentions membench and calls ``Suite``; the file is not executed.

    In a test file only module-level calls count: functions there create suites for their own use.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    if "membench" not in text or _MAKES_SUITE.search(text) is None:
        return False
    try:
        return not is_tests or _calls_suite(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError):
        return False  # pytest reports the error


def _calls_suite(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Suite":
        return True
    return any(map(_calls_suite, ast.iter_child_nodes(node)))


def _is_suite(path: Path, is_named: bool) -> bool:
    """Whether a TOML file has a table [suite]; a file not named by the user also needs [matrix] or [script]."""
    import tomllib

    try:
        if path.stat().st_size > _LARGEST_SUITE_BYTES:
            return False
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return False
    if "suite" not in text:
        return False
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError):
        # The user named the file as a suite: loading it reports the error.
        return is_named and _SUITE_TABLE.search(text) is not None
    has_content = isinstance(parsed.get("matrix"), dict) or isinstance(parsed.get("script"), dict)
    return isinstance(parsed.get("suite"), dict) and (is_named or has_content)


class SuiteFile(pytest.File):
    """A suite. It opens an executor for its first measured case and closes it after the last."""

    def __init__(self, *, suite: Suite | None = None, **others: Any) -> None:
        """Create the collector; ``suite`` is one of several suites in a file, else the file is loaded."""
        super().__init__(**others)
        self._suite = suite

    def collect(self) -> Iterator[CaseItem | SuiteFile]:
        suites = [self._suite] if self._suite else self._suites()
        if len(suites) > 1:
            for suite in suites:
                nodeid = f"{self.nodeid}::{suite.name}"
                yield SuiteFile.from_parent(self, path=self.path, name=suite.name, nodeid=nodeid, suite=suite)
            return
        (self.suite,) = suites
        self._refuse_duplicate_name()
        for case in self.suite.cases:
            yield CaseItem.from_parent(self, name=case.id, case=case)

    def _refuse_duplicate_name(self) -> None:
        """Refuse two suites with the same name, because a baseline identifies its suite by name."""
        known = self.config.stash.setdefault(_COLLECTED, {})
        first = known.setdefault(self.suite.name, self.nodeid)
        asked = [name for name in ("save", "compare") if self.config.getoption(f"membench_{name}") is not None]
        if first != self.nodeid and asked:
            raise self.CollectError(
                f"{first} and {self.nodeid} are both named '{self.suite.name}', and --membench-{asked[0]} goes by that:"
                " give one of them another name, or run them apart"
            )

    def _suites(self) -> list[Suite]:
        from membench.errors import MembenchError
        from membench.suite.loading import load_suite, suites_in

        path = Path(os.path.relpath(self.path))
        try:
            return suites_in(path) if path.suffix == ".py" else [load_suite(path)]
        except MembenchError as error:
            raise self.CollectError(str(error)) from None

    def setup(self) -> None:
        self._executor: Executor | None = None

    def teardown(self) -> None:
        if self._executor is not None:
            self._executor.__exit__(None, None, None)
            self._executor = None

    @property
    def header(self) -> dict[str, Any]:
        """The header of the run file for the suite's records."""
        from membench.running.session import header_of

        header = header_of(self.suite, Sharing.of(self.config).started, self._code)
        number = self._file_number()
        return header if number == 1 else {**header, "run": f"{header['run']}-{number}"}

    @functools.cached_property
    def _code(self) -> CodeVersion:
        from membench.host.code_version import code_version

        return code_version(self.suite.code_folder)

    def _file_number(self) -> int:
        """Return the number of this suite's file among those of the same name; equal in all workers of xdist."""
        files = {item.parent for item in self.session.items if isinstance(item, CaseItem)}
        same_name = sorted(file.nodeid for file in files if file.suite.name == self.suite.name)
        return same_name.index(self.nodeid) + (2 if self.suite.name == FUNCTIONS else 1)

    def measure(self, item: CaseItem) -> tuple[list[Record], list[Record]]:
        """Return the records of an item's case and those of its reference, one per repeat.

        The reference is measured first, because other cases are compared with its logits. The first test in any worker
        that needs it measures it; later tests reuse its records.

        Raises:
            MembenchError: if a case cannot be measured.
        """
        from membench.protocol.case import REFERENCE

        reference = next(
            case for case in self.suite.cases if case.technique == REFERENCE and case.group == item.case.reference_group
        )
        records = self._reference(item, reference)
        if item.case is reference:
            return records, records
        for record in records:
            self._losses.add(record)
        own = self._measure(item.case, range(self.suite.settings.repeats))
        self._keep(item, own)
        return own, records

    def measure_again(self, item: CaseItem, repeat: int) -> Record:
        """Measure another repeat of an item's case."""
        (record,) = self._measure(item.case, (repeat,))
        self._keep(item, [record])
        return record

    def _reference(self, item: CaseItem, case: Case) -> list[Record]:
        from membench.records.encoding import as_json, record_of

        def measure_reference() -> list[dict[str, Any]]:
            return [as_json(each) for each in self._measure(case, range(self.suite.settings.repeats))]

        found, is_new = Sharing.of(self.config).once(f"{self.nodeid}::{case.id}", measure_reference)
        records = [record_of(record) for record in found]
        if is_new:
            self._keep(item, records)
        return records

    def _keep(self, item: CaseItem, records: Sequence[Record]) -> None:
        from membench.records.encoding import as_json

        for record in records:
            entries.add(item, self.header, as_json(record))

    def _measure(self, case: Case, repeats: Iterable[int]) -> list[Record]:
        sharing = Sharing.of(self.config)
        gpu = sharing.gpu([case.device for case in self._selected()])
        with gpu.held if Device.parse(case.device).on_gpu else contextlib.nullcontext():
            executor = self._open_executor(gpu.variables)
            records = [executor.measure(self._job(case, repeat)) for repeat in repeats]
        for record in records:
            self._losses.add(record)
        return records

    def _job(self, case: Case, repeat: int) -> RunnableJob:
        from membench.running.jobs.from_case import job_from_case

        return job_from_case(case, repeat, self.suite.settings, self.suite.limits, losses=self._losses)

    @functools.cached_property
    def _losses(self) -> KnownLosses:
        """The losses of the suite's cases that this process knows."""
        from membench.running.losses import KnownLosses

        return KnownLosses()

    def _selected(self) -> tuple[Case, ...]:
        """Return the selected cases and the references they need."""
        ids = {item.case.id for item in self.session.items if isinstance(item, CaseItem) and item.parent is self}
        return self.suite.select(lambda id: id in ids)

    def _open_executor(self, variables: dict[str, str]) -> Executor:
        from membench.pytest_plugin import executing
        from membench.running.needs import Needs

        if self._executor is None:
            folder = Sharing.of(self.config).references / self.header["run"]
            needs = Needs.of([self._job(case, 0) for case in self._selected()], folder, variables)
            self._executor = executing.open_executor(self.config, needs)
        return self._executor


_COLLECTED = pytest.StashKey[dict[str, str]]()


class CaseItem(pytest.Item):
    """A case of a suite as a test."""

    parent: SuiteFile

    def __init__(self, *, case: Case, **others: Any) -> None:
        super().__init__(**others)
        self.case = case
        self.skipped_at = self.path
        if Device.parse(case.device).on_gpu:
            self.add_marker("gpu")
        if self.config.pluginmanager.hasplugin("benchmark"):
            # pytest-benchmark recognizes benchmarks by these, for --benchmark-skip and --benchmark-only.
            self.fixturenames = ["benchmark"]
            self.funcargs: dict[str, Any] = {}

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name

    def runtest(self) -> None:
        from membench.errors import MembenchError
        from membench.pytest_plugin import outcome

        try:
            records, reference = self.parent.measure(self)
            failures = [
                *outcome.broken_gates(self, self.parent.suite.gates, records, reference),
                *self._regressions(records),
            ]
        except MembenchError as error:
            raise pytest.fail.Exception(f"membench: {error}", pytrace=False) from None
        outcome.add_figures(self, records)
        if self.config.pluginmanager.hasplugin("benchmark"):
            from membench.pytest_plugin import timing

            timing.add_case(self, self.funcargs, " · ".join(self.case.group), records)
        outcome.settle(self, records, failures)

    def _regressions(self, records: Sequence[Record]) -> list[str]:
        """Return messages for regressions against the baseline."""
        if self.config.getoption("membench_compare") is None or any(record.status != "ok" for record in records):
            return []
        from membench.pytest_plugin.judging import Judge

        judge = Judge.of(self.config)
        assert judge is not None
        suite = self.parent.suite
        return judge.failures(
            self,
            suite.name,
            records,
            suite.tolerances,
            lambda repeat: self.parent.measure_again(self, repeat),
            suite.own_metrics,
        )


def refuse_unknown_metrics(session: pytest.Session) -> None:
    """Check the metrics in ``--membench-fail``, once suites with their own metrics are collected.

    Raises:
        pytest.UsageError: if a metric is unknown.
    """
    from membench.errors import MembenchError
    from membench.pytest_plugin import judging

    files = {item.parent for item in session.items if isinstance(item, CaseItem)}
    try:
        judging.refuse_unknown(session.config, [metric for file in files for metric in file.suite.own_metrics])
    except MembenchError as error:
        raise pytest.UsageError(f"membench: {error}") from None
