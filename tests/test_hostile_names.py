"""Names that mean something in a format are text in it, whatever suite or record they come from."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from membench.errors import one_line
from membench.records.record import Record
from membench.report import formats, phase_table, savings, text
from tests import made_up

from .made_up import MIB, record, run

_NAMES = (
    "<img src=x onerror=alert(1)>",
    "</td></table><script>alert(1)</script>",
    "a|b||c",
    "`code` ``` ~~gone~~ **bold** _slanted_",
    "[link](https://example.invalid) ![picture](x)",
    "# heading",
    "- item",
    "&lt;b&gt; &amp;",
    "=HYPERLINK(1)",
    "+1",
    "-1+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1",
    "two\nlines\r\x1b[31mred\u202eleft\u2028",
    r"\input{x} $x^2$ 50% {a}_b ~ # & \\",
)  # fmt: skip


def _spoilt(name: str, technique: str) -> Record:
    made = record(technique, name, model=name, peak_live_bytes=MIB, step_median_s=1.0, weights_bytes=MIB)
    process = {"role": name, "rank": 0, "breakdown_bytes": {name: {name: MIB}}, "peak_part": name,
               "phases": [{"name": name, "allocator": name, "duration_s": 1.0, "peak_live_bytes": MIB}]}  # fmt: skip
    return dataclasses.replace(
        made, message=name, remarks=(name,), notes=(name,), processes=(made_up.process(**process),)
    )


_RECORDS = tuple(_spoilt(name, technique) for name in _NAMES for technique in ("none", name, f"{name}+b"))
_RUN = run(_RECORDS, suite=_NAMES[0], suite_text="\n".join(_NAMES), machine={"processor": _NAMES[1]})


class _Read(HTMLParser):
    """What a browser makes of a text: its tags and what is shown."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.shown = ""
        self.feed(written)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.shown += data


def _missing(shown: str) -> list[str]:
    """The names that are not to be read in a text, each on one line with what steers written out."""
    words = " ".join(shown.split())
    return [name for name in _NAMES if " ".join(one_line(name).split()) not in words]


def _rendered(written: str) -> _Read:
    return _Read(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(written))


@pytest.mark.parametrize(
    "written",
    [
        formats.REPORTS["md"].write([_RUN]), text.comparison(_RECORDS, "github"), text.explanation(_RECORDS, "github"),
        phase_table.phases(_RECORDS, "github"),
    ],
    ids=["report", "comparison", "explanation", "phases"],
)  # fmt: skip
def test_in_markdown_they_are_shown_as_they_are_written_and_mean_nothing(written: str) -> None:
    read = _rendered(written)
    assert read.tags <= {"h1", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
    assert _missing(read.shown) == []


def test_in_a_spreadsheet_none_is_a_formula() -> None:
    (head, *rows) = csv.reader(io.StringIO(formats.REPORTS["csv"].write([_RUN])))
    assert len(rows) == len(_RECORDS)
    assert {len(row) for row in rows} == {len(head)}
    for row in rows:
        assert not [cell for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not _is_number(cell)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_in_json_they_are_themselves() -> None:
    assert [row["case"] for row in json.loads(formats.REPORTS["json"].write([_RUN]))] == [one.id for one in _RECORDS]


@pytest.mark.parametrize(
    "written",
    [formats.REPORTS["latex"].write([_RUN]), text.comparison(_RECORDS, "latex")],
    ids=["report", "comparison"],
)
def test_in_latex_none_is_a_command_a_formula_or_a_comment(written: str) -> None:
    plain = re.sub(r"\\[&%$#_{}^]|\\\\", "", written)  # signs that are escaped, and the ends of rows
    commands = {"section*", "subsection*", "begin", "end", "hline", "item", "textbackslash", "textasciitilde"}
    assert set(re.findall(r"\\([a-zA-Z]+\*?)", plain)) <= commands | {"ensuremath"}
    assert not re.search(r"[$%#_^~]", re.sub(r"\^\{\}", "", plain))


def test_in_html_they_are_text() -> None:
    for show in (text.comparison, text.explanation, phase_table.phases):
        read = _Read(show(_RECORDS, "html"))
        assert read.tags == {"h3", "table", "thead", "tbody", "tr", "th", "td"}
        assert _missing(read.shown) == []


def test_in_a_terminal_none_steers_it() -> None:
    for written in (text.comparison(_RECORDS), text.explanation(_RECORDS), phase_table.phases(_RECORDS)):
        assert all(line.isprintable() for line in written.split("\n"))
    assert all(line.isprintable() for line in (*text.remarks(_RECORDS), *savings.verdicts(_RECORDS)))
