"""Text of others in Markdown, where it is to stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from membench.errors import one_line
from membench.host import console

_SIGNS = re.compile(r"([\\`*_\[\]|~])")
# What makes a heading, a rule or an item of a list.
_AT_THE_BEGINNING = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[#+=-]|::))(.)")
# What GitHub makes a link or a mention of without any sign of Markdown. It looks for mentions in what is shown: only an
# element, such as a comment, keeps the sign and the name apart.
_ADDRESS = re.compile(r"(?<=\w)://|\bwww\.", re.IGNORECASE)
_MENTION = re.compile(r"(?<!\w)@(?=\w)")

_MEANS_SOMETHING = re.compile(
    r"""
    ^\s*(?:[-+*=>|\[:\#]|\d+[.)](?:\s|$)) | ^\s{4}       # a list, a heading, a rule, a quotation, a table, code
    | ` | \\ | \$                                        # code, escapes, formulas
    | <[a-z/!?] | &[\w\#]+;                              # HTML
    | \][(\[] | !\[                                      # links and pictures
    | [a-z]:// | \bwww\. | @[\w.-]+\.(?!jsonl?\b)[a-z]   # addresses, but for the names of membench's own files
    | (?<!\w)@\w | \#\d | \bGH-\d                        # mentions
    | \*\S | (?<![^\W_])_+\S | \w_+(?![^\W_]|_) | ~~|~[a-z] | \w~  # emphasis
    """,
    re.VERBOSE | re.IGNORECASE,
)


def escaped(text: str) -> str:
    """One line in which neither Markdown nor HTML finds anything of theirs, be it in a heading, a bullet or a cell."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = _AT_THE_BEGINNING.sub(r"\1\\\2", _SIGNS.sub(r"\\\1", plain))
    return _MENTION.sub(
        "@<!-- -->", _ADDRESS.sub(lambda found: found[0].replace("/", "&#47;").replace(".", "&#46;"), shown)
    )


def verbatim(text: str) -> str:
    """One line of a paragraph that is shown as it is: as code, if Markdown or GitHub would find something in it."""
    plain = one_line(text)
    if not _MEANS_SOMETHING.search(plain):
        return plain
    ticks = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    room = " " if plain.startswith(("`", " ")) or plain.endswith(("`", " ")) else ""
    return f"{ticks}{room}{plain}{room}{ticks}"


def fenced(lines: Sequence[str], language: str) -> str:
    """Lines as a block of code that none of them can end."""
    shown = [console.without_commands(one_line(line)) for line in lines]
    fence = "`" * max(3, 1 + max((len(ticks) for line in shown for ticks in re.findall("`+", line)), default=0))
    return "\n".join([f"{fence}{language}", *shown, fence])
