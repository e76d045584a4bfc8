"""Documents to token ids, and token ids to rows.

Text that is not UTF-8: bytes are bytes to a vocabulary of bytes. To one of words, each byte that begins no character
and each character that is cut off is U+FFFD, as Unicode recommends and Python does; a note says how many there were. A
tokenizer has its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from membench.data import sources
from membench.data.corpus import Words, replaced

if TYPE_CHECKING:
    import numpy

    from membench.plugins import Model
    from membench.plugins.storage import Ids

    Numbers = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint32]]

PADDING = 0


def are_words(model: Model, vocabulary: int) -> bool:
    """Whether token ids are ranks of words: the model has no tokenizer, and its vocabulary is not of bytes."""
    return vocabulary > 256 and model.encode(b"") is None


@functools.cache
def words_of(source: str, most_bytes: int | None) -> Words:
    """The words of a whole source: less of it, or other text, has the same ids."""
    return Words(sources.documents(source, most_bytes))


@functools.cache
def replaced_in(source: str, most_bytes: int | None) -> int:
    """Bytes and cut-off characters of a source that are not UTF-8, and are U+FFFD to a vocabulary of words."""
    return sum(map(replaced, sources.documents(source, most_bytes)))


def encoded(documents: Sequence[bytes], model: Model, vocabulary: int, words: Callable[[], Words]) -> list[Numbers]:
    """Token ids of each document: the model's own, bytes where the vocabulary is of bytes, else words by their rank.

    The last id of a vocabulary of words stands for all words that are rarer.
    """
    import numpy

    if are_words(model, vocabulary):
        return [numpy.minimum(words().ranks(document), vocabulary - 1, dtype=numpy.uint32) for document in documents]
    if model.encode(b"") is not None:
        return [numpy.asarray(model.encode(document), numpy.uint32) for document in documents]
    # Views of one array: arrays of their own would leave holes in the heap, which count once they are filled.
    flat = numpy.frombuffer(b"".join(documents), numpy.uint8).astype(numpy.uint32) % vocabulary
    return numpy.split(flat, numpy.cumsum([len(document) for document in documents])[:-1])


def rows(documents: Sequence[Numbers], length: int, padded: bool) -> tuple[Ids, int]:
    """Rows (rows, length), and how many of their tokens are padding.

    Documents follow one another, and what does not fill the last row is left out; or, padded, each begins a row.
    """
    import numpy

    if not padded:
        flat = numpy.concatenate(documents)
        return flat[: len(flat) // length * length].reshape(-1, length), 0
    whole = numpy.full((sum(-(-len(document) // length) for document in documents), length), PADDING, numpy.uint32)
    row = 0
    for document in documents:
        count = -(-len(document) // length)
        whole[row : row + count].reshape(-1)[: len(document)] = document
        row += count
    return whole, whole.size - sum(map(len, documents))
