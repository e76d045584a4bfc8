"""Labelled samples: their sources, and how they are stored.

A batch is one tensor (samples, features + 1), float32: features between 0 and 1, and the class in the last column. So
whatever splits or moves the rows of a batch keeps a sample and its class together.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy
    import torch

    Features = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.uint8]]
    Classes = numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]


@dataclass(frozen=True)
class StoredSamples:
    """Samples that are kept, a byte a feature and one for the class; drawn from in shuffled epochs.

    Attributes:
        features: (samples, width).
        labels: the class of each.
        largest: the number that stands for a feature of 1.
        packed_bytes: that they were kept in, if they were unpacked from something; else they are kept as they are.
    """

    features: Features
    labels: Classes
    classes: int
    largest: int
    packed_bytes: int | None = None

    def unpacked_from_xz(self) -> StoredSamples:
        """The same samples after they have been kept compressed: as xz(1) does it at its best."""
        import numpy

        packed = lzma.compress(self.features.tobytes() + self.labels.tobytes(), preset=9 | lzma.PRESET_EXTREME)
        raw = numpy.frombuffer(lzma.decompress(packed), numpy.uint8)
        features, labels = raw[: self.features.size].reshape(self.features.shape), raw[self.features.size :]
        return replace(self, features=features, labels=labels, packed_bytes=len(packed))

    def copied(self) -> StoredSamples:
        """The same samples in memory of their own."""
        return replace(self, features=self.features.copy(), labels=self.labels.copy())

    @property
    def width(self) -> int:
        return self.features.shape[1]

    @property
    def kept_bytes(self) -> int:
        return self.features.nbytes + self.labels.nbytes if self.packed_bytes is None else self.packed_bytes

    def of_class(self, label: int) -> Features:
        chosen: Features = self.features[self.labels == label]
        return chosen

    def rows(self) -> torch.Tensor:
        """All samples, as a batch in their own order."""
        import numpy

        return self._batch(numpy.arange(len(self.labels)))

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        import numpy

        random = numpy.random.default_rng(seed)
        order = random.permutation(len(self.labels))
        while True:
            while len(order) < size:
                order = numpy.concatenate([order, random.permutation(len(self.labels))])
            yield self._batch(order[:size])
            order = order[size:]

    def _batch(self, chosen: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]) -> torch.Tensor:
        import numpy
        import torch

        batch = numpy.empty((len(chosen), self.width + 1), numpy.float32)
        numpy.divide(self.features[chosen], self.largest, out=batch[:, :-1])
        batch[:, -1] = self.labels[chosen]
        return torch.from_numpy(batch)


class Parts(NamedTuple):
    """Samples to train on, and those that are kept from training."""

    train: StoredSamples
    held_out: StoredSamples


@functools.cache
def read(source: str) -> Parts:
    """The samples of a source, in a fixed order and always parted alike; the source's name is one of ``SOURCES``."""
    return SOURCES[source]()


def _digits() -> Parts:
    """1,797 handwritten digits of 8 × 8 pixels, each 0 to 16 (UCI's optical recognition; scikit-learn carries them)."""
    import numpy
    import sklearn.datasets  # type: ignore[import-untyped]

    found = sklearn.datasets.load_digits()
    return _parted(found.data.astype(numpy.uint8), found.target.astype(numpy.uint8), 10, largest=16)


CHAPTERS: Mapping[str, tuple[str, ...]] = {
    "statements": (
        "assert", "assignment", "async", "augassign", "break", "class", "compound", "continue", "del",
        "dynamic-features", "else", "exceptions", "execmodel", "for", "function", "global", "if", "import", "naming",
        "nonlocal", "pass", "raise", "return", "try", "while", "with",
    ),
    "expressions": (
        "atom-identifiers", "atom-literals", "attribute-references", "await", "binary", "bitwise", "booleans", "calls",
        "comparisons", "conversions", "dict", "exprlists", "floating", "id-classes", "identifiers", "imaginary", "in",
        "integers", "lambda", "lists", "numbers", "operator-summary", "power", "shifting", "slicings", "strings",
        "subscriptions", "unary",
    ),
    "data model": (
        "attribute-access", "callable-types", "context-managers", "customization", "numeric-types", "objects",
        "sequence-types", "specialnames", "types",
    ),
    "built-in types": (
        "bltin-code-objects", "bltin-ellipsis-object", "bltin-null-object", "bltin-type-objects", "specialattrs",
        "string-methods", "truth", "typesfunctions", "typesmapping", "typesmethods", "typesmodules", "typesseq",
        "typesseq-mutable", "formatstrings",
    ),
    "debugger": ("debugger",),
}  # fmt: skip
"""Topics of Python's help on itself, by the part of its documentation that they are from: the classes of its text."""

_FEWEST_WORDS = 8
_BUCKETS = 512


def _topics_text() -> Parts:
    """Paragraphs of Python's help on itself; the class is the part of its documentation that one is from.

    A paragraph that stands in two parts, or has fewer than eight words, is left out; one that stands in several topics
    of a part counts once.
    """
    from pydoc_data import topics

    import numpy

    chapters: dict[str, set[int]] = {}
    for label, names in enumerate(CHAPTERS.values()):
        for name in names:
            for paragraph in topics.topics.get(name, "").split("\n\n"):
                chapters.setdefault(paragraph.strip(), set()).add(label)
    chosen = [
        (text, labels.pop())
        for text, labels in chapters.items()
        if len(labels) == 1 and len(_words(text)) >= _FEWEST_WORDS
    ]
    features = numpy.stack([_hashed_grams(text) for text, _ in chosen])
    return _parted(features, numpy.array([label for _, label in chosen], numpy.uint8), len(CHAPTERS), largest=255)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hashed_grams(text: str) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]:
    """Runs of four characters within the text's words, their ends marked, counted in 512 buckets by their CRC-32.

    Roots of the counts, brought to length 1, in steps of 1/255. Feature hashing (Weinberger et al., 2009,
    arXiv:0902.2206) without signs.
    """
    import numpy

    marked = [f"^{word}$" for word in _words(text)]
    grams = [word[start : start + 4] for word in marked for start in range(max(1, len(word) - 3))]
    counts = numpy.bincount([zlib.crc32(gram.encode()) % _BUCKETS for gram in grams], minlength=_BUCKETS)
    roots = numpy.sqrt(counts)
    scaled: numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]] = numpy.rint(
        255 * roots / numpy.linalg.norm(roots)
    ).astype(numpy.uint8)
    return scaled


def _parted(features: Features, labels: Classes, classes: int, largest: int) -> Parts:
    """Some 30% are held out, by a hash of their features: equal samples never stand on both sides."""
    import numpy

    held_out = numpy.array([hashlib.sha256(sample.tobytes()).digest()[0] < 77 for sample in features])
    train, kept_back = (StoredSamples(features[some], labels[some], classes, largest) for some in (~held_out, held_out))
    return Parts(train, kept_back)


SOURCES: Mapping[str, Callable[[], Parts]] = {"digits": _digits, "topics-text": _topics_text}
