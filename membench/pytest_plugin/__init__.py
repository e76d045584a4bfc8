"""membench inside pytest: suites collected as tests, the fixture and the marker ``membench``, options.

pytest loads this module in every environment with membench installed. It imports almost nothing at load time; modules
are imported where they are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from membench.pytest_plugin import entries

if TYPE_CHECKING:
    import pluggy

    from membench.pytest_plugin.comparing import Comparison
    from membench.pytest_plugin.fixture import MembenchFixture
    from membench.pytest_plugin.keeping import Keeper
    from membench.pytest_plugin.timing import Timing
    from membench.pytest_plugin.unchecked import UncheckedRules


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("membench")
    group.addoption(
        "--membench-save",
        metavar="NAME",
        nargs="?",
        const="",
        type=_baseline,
        help="Keep what is measured as a baseline; without NAME, as that of its suite on this class of machines.",
    )
    group.addoption(
        "--membench-compare",
        metavar="NAME",
        nargs="?",
        const="",
        type=_baseline,
        help="Fail tests that take more than a baseline or run says; without NAME, than that of their suite on this"
        " class of machines. What looks worse is measured three times more before it fails.",
    )
    group.addoption(
        "--membench-fail",
        metavar="TOLERANCE",
        action="append",
        default=[],
        help="How much worse a figure may get: peak_live:2%%, time:10%%, peak_live:16MiB, 'llama-*:time:off'. Can be"
        " given several times.",
    )
    group.addoption(
        "--membench-output",
        metavar="FOLDER",
        type=_folder,
        help="The folder for what is measured, and for baselines; without it, 'results' in the folder where pytest was"
        " started.",
    )
    group.addoption(
        "--membench-allow-skipped",
        action="store_true",
        help="Pass although limits and gates were not checked: of skipped cases (no GPU, a missing package), or on"
        " figures that are not known; else the exit code is 3.",
    )


def _folder(name: str) -> str:
    if not name or (Path(name).exists() and not Path(name).is_dir()):
        raise argparse.ArgumentTypeError(f"'{name}' is not a folder")
    return name


def _baseline(name: str) -> str:
    if name.endswith((".toml", ".py")) or "::" in name:
        raise argparse.ArgumentTypeError(f"'{name}' is a test and no baseline; write the option after it, or with '='")
    return name


def pytest_configure(config: pytest.Config) -> None:
    if any(config.getoption(f"membench_{name}") not in (None, []) for name in ("save", "compare", "fail")):
        from membench.pytest_plugin import judging

        judging.check_options(config)
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; cases of membench suites on cuda have it.")
    config.addinivalue_line(
        "markers",
        "membench(limit='1 GiB', compare='2%', device='cuda', repeats=3): for tests with the fixture 'membench': how"
        " much live memory a function may take at most, how much more than --membench-compare says, where it is"
        " measured, and how often.",
    )
    # The fixture depends on pytest-benchmark if that is installed, which makes --benchmark-skip apply to it.
    if config.pluginmanager.hasplugin("benchmark"):
        from membench.pytest_plugin import timing

        config.pluginmanager.register(timing, "membench-timing")
    else:
        config.pluginmanager.register(_NoTiming(), "membench-timing")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Records(config), "membench-records")


class _NoTiming:
    @pytest.fixture
    def _membench_timing(self) -> None:
        """Replace the fixture for pytest-benchmark, which is not installed."""


class _Records:
    """Stores the measurements of tests. Workers of xdist do not use it: they send measurements with their reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._keeper: Keeper | None = None
        self._comparison: Comparison | None = None
        self._unchecked: UncheckedRules | None = None
        if config.getoption("membench_compare") is not None:
            from membench.pytest_plugin.comparing import Comparison

            self._comparison = Comparison(config)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # With xdist only the workers collect: here, plug-in metrics are known only from their reports.
        if self._config.getoption("membench_fail"):
            from membench.pytest_plugin import collection

            collection.refuse_unknown_metrics(session)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = entries.detach(report)
        if found and self._keeper is None:
            from membench.pytest_plugin.keeping import Keeper
            from membench.pytest_plugin.unchecked import UncheckedRules

            self._keeper = Keeper(self._config)
            self._unchecked = UncheckedRules(self._config)
        if self._keeper is not None:
            self._keeper.keep(found)
        if self._comparison is not None:
            self._comparison.add(found)
        if self._unchecked is not None:
            self._unchecked.add(found)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._keeper is not None and (code := self._keeper.finish()):
            session.exitstatus = code
        is_looked_at = not self._config.option.collectonly and session.exitstatus != pytest.ExitCode.USAGE_ERROR
        is_usage_error = self._comparison is not None and is_looked_at and self._comparison.finish()
        if is_usage_error and session.exitstatus == pytest.ExitCode.OK:  # else tests failed already
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        if self._unchecked is not None:
            self._unchecked.add_rules_of_no_case()
            if session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = self._unchecked.finish()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for source in (self._keeper, self._comparison, self._unchecked):
            if source is not None:
                source.summarize(terminalreporter)


@pytest.fixture
def membench(request: pytest.FixtureRequest, _membench_timing: Timing | None) -> MembenchFixture:
    """Measure a function in a separate process: ``result = membench(function, *args, **kwargs)``.

    ``result.peak_live``, ``held_live``, ``peak_footprint`` and ``time`` compare with text: ``< "64 MiB"``. The function
    is called twelve times; its exceptions are raised here.
    """
    from membench.pytest_plugin.fixture import MembenchFixture

    return MembenchFixture(request, _membench_timing)


@pytest.hookimpl(trylast=True)  # tests in a file are collected before its suites
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix not in (".toml", ".py"):
        return None
    if file_path.suffix == ".py" and not parent.session.isinitpath(file_path):  # detection reads the file
        return None
    from membench.pytest_plugin import collection

    return collection.suite_file(file_path, parent)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Send the shared state of the pytest run to a worker of xdist."""
    from membench.pytest_plugin.sharing import Sharing

    node.workerinput["membench"] = Sharing.of(node.config).worker_input()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("membench") is not None:
        from membench.pytest_plugin import marker

        marker.check(item)


# An old-style wrapper: with an older pytest, a new-style one would abort every run.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pluggy.Result[pytest.TestReport], None]:
    if call.excinfo is not None:
        from membench.pytest_plugin import raising

        raising.explain(item, call.excinfo.value)
    report = (yield).get_result()
    entries.attach(report, item)
    where = getattr(item, "skipped_at", None)
    if where is not None and report.skipped and isinstance(report.longrepr, tuple):
        # Without this, the report would name a line of membench.
        report.longrepr = (str(where), None, report.longrepr[2])  # type: ignore[assignment]
