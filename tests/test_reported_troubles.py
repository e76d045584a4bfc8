"""The page on parallel techniques answers what users report, and names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import membench

_PAGE = Path(membench.__file__).parent / "docs" / "parallel.md"
_TROUBLES = 36


def _rows() -> list[list[str]]:
    """Return the cells of each row of the table: number, what is reported, where, and the answer."""
    found = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", _PAGE.read_text(), re.MULTILINE)
    return [list(row) for row in found]


def test_each_reported_trouble_has_an_answer() -> None:
    assert [int(number) for number, *_ in _rows()] == list(range(1, _TROUBLES + 1))
    # What no test shows is called unanswered, or answered in part, or is a figure that only GPUs have.
    tested = re.compile(r"`test_|the same test|tests? of")
    untested = {int(number) for number, _, _, answer in _rows() if not tested.search(answer)}
    said = {int(number) for number, _, _, answer in _rows() if re.search("not answered|in part|on GPUs|as 26", answer)}
    assert untested <= said


def test_every_test_that_an_answer_names_is_there() -> None:
    there = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = re.findall(r"`(test_\w+)`", _PAGE.read_text())
    assert named
    assert set(named) <= there
