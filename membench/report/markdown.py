"""Text of others in Markdown, where it is to stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from membench.errors import one_line

_SIGNS = re.compile(r"([\\`*_\[\]|~])")
# What makes a heading, a rule or an item of a list.
_AT_THE_BEGINNING = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[#+=-]))(.)")


def escaped(text: str) -> str:
    """One line in which neither Markdown nor HTML finds anything of theirs, be it in a heading, a bullet or a cell."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _AT_THE_BEGINNING.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", plain))


def fenced(lines: Sequence[str], language: str) -> str:
    """Lines as a block of code that none of them can end."""
    shown = [one_line(line) for line in lines]
    fence = "`" * max(3, 1 + max((len(ticks) for line in shown for ticks in re.findall("`+", line)), default=0))
    return "\n".join([f"{fence}{language}", *shown, fence])
