"""A suite as a file of tests: a test a case."""

from __future__ import annotations

import ast
import contextlib
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
    from membench.protocol.case import Case
    from membench.records.record import Record
    from membench.running.executors.executor import Executor
    from membench.running.jobs.kind import RunnableJob
    from membench.suite.suite import Suite

_MAKES_SUITE = re.compile(r"^[^#\n]*\bSuite\s*\(", re.MULTILINE)
_SUITE_TABLE = re.compile(r"^\s*\[\s*suite\s*\]", re.MULTILINE)
_LARGEST_SUITE_BYTES = 2**20


def suite_file(path: Path, parent: pytest.Collector) -> SuiteFile | None:
    """The collector for a file, if it is a suite and asked for: one in Python by its name alone."""
    is_named = parent.session.isinitpath(path)
    if not is_named and not Sharing.of(parent.config).finds_suites:
        return None
    if path.suffix == ".py":
        is_suite = _makes_suite(path, any(path.match(each) for each in parent.config.getini("python_files")))
    else:
        is_suite = _is_suite(path, is_named)
    return SuiteFile.from_parent(parent, path=path) if is_suite else None


def _makes_suite(path: Path, is_tests: bool) -> bool:
    """Whether a Python file speaks of membench and calls ``Suite``; it is not run for that.

    In a file of tests, only calls that are made when it is loaded count: functions there make suites for themselves.
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
        return False  # pytest tells of it


def _calls_suite(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Suite":
        return True
    return any(map(_calls_suite, ast.iter_child_nodes(node)))


def _is_suite(path: Path, is_named: bool) -> bool:
    """Whether a file has a table [suite]; one not named must have [matrix] or [script], too, and be TOML."""
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
        # The user meant a suite, and is told what is wrong with it.
        return is_named and _SUITE_TABLE.search(text) is not None
    tells_what = isinstance(parsed.get("matrix"), dict) or isinstance(parsed.get("script"), dict)
    return isinstance(parsed.get("suite"), dict) and (is_named or tells_what)


class SuiteFile(pytest.File):
    """A suite; it measures cases, and while it does has a fork server."""

    def __init__(self, *, suite: Suite | None = None, **others: Any) -> None:
        """``suite``: one of several in a file."""
        super().__init__(**others)
        self._given = suite

    def collect(self) -> Iterator[CaseItem | SuiteFile]:
        suites = [self._given] if self._given else self._suites()
        if len(suites) > 1:
            for suite in suites:
                nodeid = f"{self.nodeid}::{suite.name}"
                yield SuiteFile.from_parent(self, path=self.path, name=suite.name, nodeid=nodeid, suite=suite)
            return
        (self.suite,) = suites
        self._refuse_namesake()
        for case in self.suite.cases:
            yield CaseItem.from_parent(self, name=case.id, case=case)

    def _refuse_namesake(self) -> None:
        """A baseline goes by its suite's name: of two suites of one name it could not tell which it is of."""
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
        """Of the file that the suite's records go to."""
        from membench.running.session import header_of

        header = header_of(self.suite, Sharing.of(self.config).started)
        number = self._number()
        return header if number == 1 else {**header, "run": f"{header['run']}-{number}"}

    def _number(self) -> int:
        """Which of those files it is that would have the same name, of suites and of functions; the same for all
        workers of xdist."""
        files = {item.parent for item in self.session.items if isinstance(item, CaseItem)}
        namesakes = sorted(file.nodeid for file in files if file.suite.name == self.suite.name)
        return namesakes.index(self.nodeid) + (2 if self.suite.name == FUNCTIONS else 1)

    def measure(self, item: CaseItem) -> tuple[list[Record], list[Record]]:
        """Of an item's case, and of its reference, a record a repeat.

        Its reference comes first, because its logits are what others are compared with. Whichever test of whichever
        worker needs it first measures it; it is not measured again.
        """
        from membench.protocol.case import REFERENCE

        reference = next(
            case for case in self.suite.cases if case.group == item.case.group and case.technique == REFERENCE
        )
        records = self._reference(item, reference)
        if item.case is reference:
            return records, records
        own = self._measured(item.case, range(self.suite.settings.repeats))
        self._keep(item, own)
        return own, records

    def measure_again(self, item: CaseItem, repeat: int) -> Record:
        """One more repeat of an item's case."""
        (record,) = self._measured(item.case, (repeat,))
        self._keep(item, [record])
        return record

    def _reference(self, item: CaseItem, case: Case) -> list[Record]:
        from membench.records.encoding import as_json, record_of

        def measured() -> list[dict[str, Any]]:
            return [as_json(each) for each in self._measured(case, range(self.suite.settings.repeats))]

        found, is_new = Sharing.of(self.config).once(f"{self.nodeid}::{case.id}", measured)
        records = [record_of(record) for record in found]
        if is_new:
            self._keep(item, records)
        return records

    def _keep(self, item: CaseItem, records: Sequence[Record]) -> None:
        from membench.records.encoding import as_json

        for record in records:
            entries.add(item, self.header, as_json(record))

    def _measured(self, case: Case, repeats: Iterable[int]) -> list[Record]:
        sharing = Sharing.of(self.config)
        gpu = sharing.gpu([case.device for case in self._wanted()])
        with gpu.held if Device.parse(case.device).on_gpu else contextlib.nullcontext():
            executor = self._started(gpu.variables)
            return [executor.measure(self._job(case, repeat)) for repeat in repeats]

    def _job(self, case: Case, repeat: int) -> RunnableJob:
        from membench.running.jobs.of_suite import job_of

        return job_of(case, repeat, self.suite.settings, self.suite.limits)

    def _wanted(self) -> tuple[Case, ...]:
        """The cases that were not deselected, and those that they need."""
        ids = {item.case.id for item in self.session.items if isinstance(item, CaseItem) and item.parent is self}
        return self.suite.select(lambda id: id in ids)

    def _started(self, variables: dict[str, str]) -> Executor:
        from membench.pytest_plugin import executing
        from membench.running.needs import Needs
        from membench.running.session import references, run_path

        if self._executor is None:
            kept_at = references(run_path(Sharing.of(self.config).output, self.header))
            needs = Needs.of([self._job(case, 0) for case in self._wanted()], kept_at, variables)
            self._executor = executing.opened(self.config, needs)
        return self._executor


_COLLECTED = pytest.StashKey[dict[str, str]]()


class CaseItem(pytest.Item):
    """A case of a suite."""

    parent: SuiteFile

    def __init__(self, *, case: Case, **others: Any) -> None:
        super().__init__(**others)
        self.case = case
        self.skipped_at = self.path
        if Device.parse(case.device).on_gpu:
            self.add_marker("gpu")
        if self.config.pluginmanager.hasplugin("benchmark"):
            # By these it knows what a benchmark is, for --benchmark-skip and --benchmark-only, and finds it.
            self.fixturenames = ["benchmark"]
            self.funcargs: dict[str, Any] = {}

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, self.name

    def runtest(self) -> None:
        from membench.errors import MembenchError
        from membench.pytest_plugin import outcome

        try:
            records, reference = self.parent.measure(self)
            wrong = [
                *outcome.broken_gates(self, self.parent.suite.gates, records, reference),
                *self._worse(records),
            ]
        except MembenchError as error:
            raise pytest.fail.Exception(f"membench: {error}", pytrace=False) from None
        outcome.add_figures(self, records)
        if self.config.pluginmanager.hasplugin("benchmark"):
            from membench.pytest_plugin import timing

            timing.of_case(self, self.funcargs, " · ".join(self.case.group), records)
        outcome.settle(self, records, wrong)

    def _worse(self, records: Sequence[Record]) -> list[str]:
        """What is worse than before."""
        if self.config.getoption("membench_compare") is None or any(record.status != "ok" for record in records):
            return []
        from membench.pytest_plugin.judging import Judge

        judge = Judge.of(self.config)
        assert judge is not None
        suite = self.parent.suite
        return judge.complaints(
            self,
            suite.name,
            records,
            suite.tolerances,
            lambda repeat: self.parent.measure_again(self, repeat),
            suite.own_metrics,
        )


def refuse_unknown_metrics(session: pytest.Session) -> None:
    """Look at ``--membench-fail`` once it is known which suites there are, and with that which metrics.

    Raises:
        pytest.UsageError: in one line.
    """
    from membench.errors import MembenchError
    from membench.pytest_plugin import judging

    files = {item.parent for item in session.items if isinstance(item, CaseItem)}
    try:
        judging.refuse_unknown(session.config, [metric for file in files for metric in file.suite.own_metrics])
    except MembenchError as error:
        raise pytest.UsageError(f"membench: {error}") from None
