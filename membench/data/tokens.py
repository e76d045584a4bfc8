"""Documents to token ids, and token ids to rows.

Text that is not UTF-8: bytes are bytes to a vocabulary of bytes. To one of words, each byte that begins no character
and each character that is cut off is U+FFFD, as Unicode recommends and Python does. A tokenizer has its own way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

    from membench.data.storage import Ids
    from membench.plugins import Model

    Numbers = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint32]]

PADDING = 0


def encoded(documents: Sequence[bytes], model: Model, vocabulary: int) -> list[Numbers]:
    """Token ids of each document: the model's own, bytes where the vocabulary is of bytes, else words by their rank."""
    import numpy

    if model.encode(b"") is not None:
        return [numpy.asarray(model.encode(document), numpy.uint32) for document in documents]
    if vocabulary <= 256:
        # Views of one array: arrays of their own would leave holes in the heap, which count once they are filled.
        flat = numpy.frombuffer(b"".join(documents), numpy.uint8).astype(numpy.uint32) % vocabulary
        return numpy.split(flat, numpy.cumsum([len(document) for document in documents])[:-1])
    words = [re.findall(r"\w+|[^\w\s]|\s+", document.decode(errors="replace")) for document in documents]
    counts = Counter(word for document in words for word in document)
    rank = {word: number % vocabulary for number, (word, _) in enumerate(counts.most_common())}
    return [numpy.array([rank[word] for word in document], numpy.uint32) for document in words]


def rows(documents: Sequence[Numbers], length: int, padded: bool) -> tuple[Ids, float]:
    """Rows (rows, length), and the share of padding in them.

    Documents follow one another, and what does not fill the last row is left out; or, padded, each begins a row.
    """
    import numpy

    if not padded:
        flat = numpy.concatenate(documents)
        return flat[: len(flat) // length * length].reshape(-1, length), 0.0
    whole = numpy.full((sum(-(-len(document) // length) for document in documents), length), PADDING, numpy.uint32)
    row = 0
    for document in documents:
        count = -(-len(document) // length)
        whole[row : row + count].reshape(-1)[: len(document)] = document
        row += count
    return whole, 1 - sum(map(len, documents)) / whole.size
