"""The English text that every CPython carries, as training text, held-out text and token ids."""

from __future__ import annotations

import functools
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence


@functools.cache
def split() -> tuple[bytes, bytes]:
    """(training, held-out) text. Paragraphs go by their own hash, so none stands in both."""
    from pydoc_data import topics

    paragraphs = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).split("\n\n")
    train: list[str] = []
    held_out: dict[str, None] = {}
    for paragraph in filter(str.strip, paragraphs):
        if hashlib.sha256(paragraph.strip().encode()).digest()[0] < 13:
            held_out[paragraph.strip()] = None
        else:
            train.append(paragraph)
    return "\n\n".join(train).encode(), "\n\n".join(held_out).encode()


def digest() -> str:
    """A hash of the whole text: it differs between Python versions, and figures with it."""
    return hashlib.sha256(b"\0".join(split())).hexdigest()[:16]


class Words:
    """The words of a text by how frequent they are in it: token ids where a model has no tokenizer."""

    def __init__(self, documents: Iterable[bytes]) -> None:
        counts = Counter(word for document in documents for word in _words(document))
        self._rank = {word: number for number, (word, _) in enumerate(counts.most_common())}

    def ranks(self, text: bytes) -> array[int]:
        """The rank of each word, from 0; all that are not among these words have the next number."""
        unseen = len(self._rank)
        return array("I", (self._rank.get(word, unseen) for word in _words(text)))


def _words(text: bytes) -> list[str]:
    return re.findall(r"\w+|[^\w\s]|\s+", text.decode(errors="replace"))


def replaced(text: bytes) -> int:
    """How many U+FFFD words are made of that do not stand in the text itself: for bytes that are not UTF-8."""
    # Those that stand in it are counted as bytes: the first of the three begins a character wherever it is.
    return text.decode(errors="replace").count("\ufffd") - text.count("\ufffd".encode())


@functools.cache
def _word_ranks() -> tuple[array[int], array[int]]:
    """(training, held-out) text as words, each by its rank of frequency in the training text."""
    train, held_out = split()
    words = Words([train])
    return words.ranks(train), words.ranks(held_out)


def read() -> None:
    """Read and split the text now, so that it is there before something is measured."""
    split()
    _word_ranks()


def ids(vocabulary: int, *, held_out: bool = False) -> bytes | array[int]:
    """Token ids of a text: bytes where the vocabulary is of bytes, else words by their rank, to be taken modulo it."""
    return split()[held_out] if vocabulary <= 256 else _word_ranks()[held_out]


def stream(source: Sequence[int], vocabulary: int) -> Callable[[int], list[int]]:
    """A function that gives the next so many token ids of a text, from its start again after its end."""
    position = 0

    def following(count: int) -> list[int]:
        nonlocal position
        taken: list[int] = []
        while len(taken) < count:
            more = source[position : position + count - len(taken)]
            taken += [token % vocabulary for token in more]
            position = (position + len(more)) % len(source)
        return taken

    return following
