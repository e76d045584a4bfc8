"""The tokens of a rule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from membench.errors import RuleError

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)(?:\s*(?P<unit>[A-Za-zµ%]+))?|(?P<name>[A-Za-z]\w*(?:\.\w+)?)"
    r"|(?P<sign><=|>=|[<>+*/()-]))"
)


@dataclass(frozen=True)
class Token:
    """A number with its unit, a name, a sign or the end; ``column`` counts from 1."""

    kind: str
    text: str
    column: int
    unit: str = ""


def tokens(text: str) -> Iterator[Token]:
    """Yield the tokens of a rule, its end last.

    Raises:
        RuleError: if something in it belongs to no token; with the column.
    """
    position = 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            column = position + len(text[position:]) - len(text[position:].lstrip()) + 1
            raise RuleError(f", column {column}: '{text[column - 1]}' has no place in a rule")
        kind = next(name for name in ("number", "name", "sign") if match[name])
        yield Token(kind, match[kind], match.start(kind) + 1, match["unit"] or "")
        position = match.end()
    yield Token("end", "", len(text) + 1)
