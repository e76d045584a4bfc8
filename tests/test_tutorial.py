"""The tutorial, done step by step: its files are written, its commands run, and what it shows is what comes out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import membench
from tests.fresh_environment import FreshEnvironment

_TUTORIAL = Path(membench.__file__).parent / "docs" / "plugins.md"


class _Block(NamedTuple):
    """What stands between fences: its language, what is said of it there, the file that the line before names, text."""

    language: str
    note: str
    named: str | None
    text: str


def _blocks() -> Iterator[_Block]:
    found = re.finditer(r"([^\n]*)\n\n```(\w+) ?([^\n]*)\n(.*?)```", _TUTORIAL.read_text(), re.DOTALL)
    for before, language, note, text in (match.groups() for match in found):
        named = re.search(r"`([\w.]+)`:$", before)
        yield _Block(language, note, named and named[1], text)


def _pattern(shown: str) -> re.Pattern[str]:
    """What fits an output: '…' is anything, in a line or in place of lines, and any space is as good as another."""
    lines = []
    for line in shown.strip("\n").split("\n"):
        words = r"[ \t]+".join(r".*".join(map(re.escape, word.split("…"))) for word in line.split())
        some = words.replace(r"[ \t]+.*", ".*")  # which may be nothing at the end of a line
        lines.append(r"(?:.*\n)*?" if line == "…" else rf"[ \t]*{some}[ \t]*\n")
    return re.compile("".join(lines))


def test_it_does_what_it_says(fresh: FreshEnvironment, tmp_path: Path) -> None:
    output = ""
    for block in _blocks():
        match block.language:
            case "sh":
                ran = fresh.run(block.text, tmp_path)
                assert (ran.returncode != 0) == (block.note == "fails"), ran.stdout + ran.stderr
                output = ran.stdout + ran.stderr if block.note else ran.stdout
            case "text":
                assert _pattern(block.text).fullmatch(output), (
                    f"{output}\n\nis not what the tutorial shows:\n\n{block.text}"
                )
            case "python" | "toml" if block.note:
                path = tmp_path / block.note.removeprefix("add to ")
                path.write_text(f"{path.read_text()}\n{block.text}")
            case "python" | "toml" if block.named:
                (tmp_path / block.named).write_text(block.text)
            case "toml":
                tomllib.loads(block.text)
            case other:
                raise AssertionError(f"a block of {other} is neither written nor run")


def test_what_it_shows_is_compared() -> None:
    assert _pattern("one  two\n…\n9 passed in …\n").fullmatch("  one two   \nleft\nout\n9 passed in 3 s\n")
    assert _pattern("one  …  9 nats  …\n").fullmatch("one  two  9 nats\n")
    assert not _pattern("one two\n").fullmatch("one three\n")
    assert not _pattern("one\n…\n").fullmatch("two\n")
    assert len([block for block in _blocks() if block.language in ("sh", "text")]) >= 12


def test_every_command_and_file_of_it_is_seen() -> None:
    assert [block.named for block in _blocks() if block.named] == [
        "half.py",
        "half.toml",
        "test_half.py",
        "test_known.py",
        "undecided.toml",
        "averaging.py",
        "averaging.toml",
    ]
