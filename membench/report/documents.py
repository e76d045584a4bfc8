"""Reports that need no browser: Markdown and LaTeX documents, and flat tables for other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from membench.records.run_file import Run
from membench.report import broken_rules, flat, latex, markdown, savings, summary, text
from membench.report.table_formats import FORMATS


def markdown_document(runs: Sequence[Run]) -> str:
    """Write runs as Markdown: highlights, table, remarks and suite of each."""
    return "\n\n".join(part for run in runs for part in _markdown(run))


def latex_document(runs: Sequence[Run]) -> str:
    """Write runs as LaTeX: a section each, to be included in a document."""
    return "\n\n".join(part for run in runs for part in _latex(run))


def flat_table(runs: Sequence[Run], form: str) -> str:
    """Write the figures of all runs as one table in a flat format; of several runs each row names its own."""
    return FORMATS[form].render([row for run in runs for row in _rows(run, len(runs) > 1)])


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
    said = [*broken_rules.remarks(run), *savings.verdicts(run.records)]
    if said:
        yield markdown.fenced(said, "text")
    language = "toml" if run.header.get("suite_tables") is None else ""
    yield markdown.fenced(str(run.header.get("suite_text", "")).splitlines(), language)


def _latex(run: Run) -> Iterator[str]:
    yield f"\\section*{{{latex.escaped(str(run.header.get('suite')))}}}"
    yield latex.escaped(summary.overview(run))
    if run.records:
        yield text.comparison(run.records, "latex")
    said = [*map(str, summary.highlights(run.records)), *broken_rules.remarks(run), *savings.verdicts(run.records)]
    if said:
        yield "\n".join([r"\begin{itemize}", *(rf"\item {latex.escaped(line)}" for line in said), r"\end{itemize}"])
