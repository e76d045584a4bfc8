"""The formats of tables. To add one, add an entry to ``FORMATS``: every verb that prints tables then offers it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from membench.errors import one_line
from membench.host import console
from membench.report import latex, markdown

Rows = Sequence[Mapping[str, object]]


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {one_line(line)}" for line in lines)


@dataclass(frozen=True)
class TableFormat:
    """How a table is written.

    Attributes:
        render: turns rows into text; the keys of the first row are the columns' titles.
        cell: makes a name from elsewhere safe as a cell or as a column's title.
        heading: writes a table's title; as a cell if not given.
        remark: makes a line below a table safe; it is plain text for people unless the format says otherwise.
        block: writes lines of others as they are, set apart from what is membench's own.
        coded: writes a sign in another way that means the same, where the sign itself would be a command in a log.
        is_flat: one table of numbers, every metric of every case; else several tables of text for reading.
        is_for_machines: a program reads the output, so nothing but tables may be in it.
        breaks: a table that is wider than the terminal is broken into several.
    """

    render: Callable[[Rows], str]
    cell: Callable[[str], str] = one_line
    heading: Callable[[str], str] | None = None
    remark: Callable[[str], str] = one_line
    block: Callable[[Sequence[str]], str] = _indented
    coded: Callable[[str], str] = console.as_escape
    is_flat: bool = False
    is_for_machines: bool = False
    breaks: bool = False

    def title(self, text: str) -> str:
        """Write a table's title."""
        return (self.heading or self.cell)(text)


def _tabulated(name: str) -> Callable[[Rows], str]:
    """Rows as tabulate writes them in its own format of this name."""

    def render(rows: Rows) -> str:
        import tabulate  # costs more than all else that the command line imports

        return tabulate.tabulate(rows, headers="keys", tablefmt=name, disable_numparse=True)

    return render


def _csv(rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(title for row in rows for title in row)))
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue().rstrip()


def _harmless(value: object) -> object:
    """A cell that no spreadsheet takes for a formula, and no terminal for a command."""
    if not isinstance(value, str):
        return value
    return f"'{one_line(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else one_line(value)


def _html_heading(text: str) -> str:
    import html

    return f"<h3>{html.escape(one_line(text))}</h3>"


def _as_entity(sign: str) -> str:
    return f"&#{ord(sign)};"


def _json(rows: Rows) -> str:
    return json.dumps(rows, indent=2)


# Tabulate itself escapes the cells of HTML and LaTeX.
FORMATS: Mapping[str, TableFormat] = {
    "simple": TableFormat(_tabulated("simple"), breaks=True),
    "github": TableFormat(
        _tabulated("github"),
        cell=markdown.escaped,
        remark=markdown.verbatim,
        block=lambda lines: markdown.fenced(lines, "text"),
        coded=_as_entity,
    ),
    "csv": TableFormat(_csv, is_flat=True, is_for_machines=True),
    "json": TableFormat(_json, coded=lambda sign: f"\\u{ord(sign):04x}", is_flat=True, is_for_machines=True),
    "latex": TableFormat(
        _tabulated("latex"),
        heading=lambda text: rf"\subsection*{{{latex.escaped(text)}}}",
        coded=lambda sign: f"{{}}{sign}",
        is_for_machines=True,
    ),
    "html": TableFormat(_tabulated("html"), heading=_html_heading, coded=_as_entity, is_for_machines=True),
    "plain": TableFormat(_tabulated("plain"), breaks=True),
}
"""By the name that ``--format`` takes, in the order of the help."""

DEFAULT = next(iter(FORMATS))

FOR_PEOPLE = tuple(name for name, form in FORMATS.items() if not form.is_for_machines)
