"""A report in the formats that are read without a browser's help, or by another program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from membench.records.run_file import Run
from membench.report import flat, latex, markdown, savings, summary, text

FORMATS = {"html": ".html", "md": ".md", "csv": ".csv", "json": ".json", "latex": ".tex"}
"""Each with the ending of its files."""


def report(runs: Sequence[Run], form: str) -> str:
    """Runs in one of ``FORMATS``.

    Raises:
        MembenchError: if the libraries that make a page are not installed.
    """
    match form:
        case "html":
            from membench.report.page import page

            return page(runs)
        case "csv" | "json":
            return flat.written([row for run in runs for row in _rows(run, len(runs) > 1)], form)
        case "latex":
            return "\n\n".join(part for run in runs for part in _latex(run))
    return "\n\n".join(part for run in runs for part in _markdown(run))


def _rows(run: Run, is_one_of_several: bool) -> Iterator[dict[str, Any]]:
    for row in flat.flat_rows(run.records):
        yield {"run": run.header.get("run"), **row} if is_one_of_several else row


def _markdown(run: Run) -> Iterator[str]:
    yield f"# {markdown.escaped(str(run.header.get('suite')))}"
    yield markdown.escaped(summary.overview(run))
    told = summary.highlights(run.records)
    if told:
        yield "\n".join(f"- {markdown.escaped(str(line))}" for line in told)
        yield summary.HOW_TO_READ
    if run.records:
        yield text.comparison(run.records, "github")
    said = [*text.remarks(run.records), *savings.verdicts(run.records)]
    if said:
        yield markdown.fenced(said, "text")
    language = "toml" if run.header.get("suite_tables") is None else ""
    yield markdown.fenced(str(run.header.get("suite_text", "")).splitlines(), language)


def _latex(run: Run) -> Iterator[str]:
    yield f"\\section*{{{latex.escaped(str(run.header.get('suite')))}}}"
    yield latex.escaped(summary.overview(run))
    if run.records:
        yield text.comparison(run.records, "latex")
    said = [*map(str, summary.highlights(run.records)), *text.remarks(run.records), *savings.verdicts(run.records)]
    if said:
        yield "\n".join([r"\begin{itemize}", *(rf"\item {latex.escaped(line)}" for line in said), r"\end{itemize}"])
