"""The formats of whole reports and of exports to other services. To add one, add an entry to its table.

What writes a format is imported when it is asked for: the command line needs the names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from membench.records.record import Record
    from membench.records.run_file import Run


class ReportFormat(NamedTuple):
    ending: str
    """Of its files: ``-o report.md`` chooses the format."""
    write: Callable[[Sequence[Run]], str]


def _page(runs: Sequence[Run]) -> str:
    from membench.report.page import page

    return page(runs)


def _markdown(runs: Sequence[Run]) -> str:
    from membench.report import documents

    return documents.markdown_document(runs)


def _latex(runs: Sequence[Run]) -> str:
    from membench.report import documents

    return documents.latex_document(runs)


def _table(form: str) -> Callable[[Sequence[Run]], str]:
    """The figures alone, as a flat table of this format."""

    def write(runs: Sequence[Run]) -> str:
        from membench.report import documents

        return documents.flat_table(runs, form)

    return write


REPORTS: Mapping[str, ReportFormat] = {
    "html": ReportFormat(".html", _page),
    "md": ReportFormat(".md", _markdown),
    "csv": ReportFormat(".csv", _table("csv")),
    "json": ReportFormat(".json", _table("json")),
    "latex": ReportFormat(".tex", _latex),
}
"""By the name that ``membench report --format`` takes; the first one is the default."""

DEFAULT_REPORT = next(iter(REPORTS))


def _benchmark_action(records: Sequence[Record]) -> str:
    from membench.report import services

    return services.benchmark_action(records)


def _bencher(records: Sequence[Record]) -> str:
    from membench.report import services

    return services.bencher(records)


EXPORTS: Mapping[str, Callable[[Sequence[Record]], str]] = {"benchmark-action": _benchmark_action, "bencher": _bencher}
"""By the name that ``membench export`` takes."""

PICTURES = ("pareto", "memory", "conversion", "breakdown", "ranks", "timeline", "history")
"""The kinds of picture that ``membench plot`` draws; ``report.files`` draws them."""
