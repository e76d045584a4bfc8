"""How rows of token ids are kept and read: what data techniques put together, and a format of shards for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy

    Ids: TypeAlias = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.unsignedinteger]]
    """Rows of token ids (rows, tokens of a row), of any unsigned type."""
    Type: TypeAlias = numpy.dtype[numpy.unsignedinteger]


Buffer: TypeAlias = bytes | memoryview

BLOCK_TOKENS = 2**20
"""Of a block by which rows are shuffled and read (see ``order``), and the most of a frame. With smaller ones threads
wait for each other's Python as long as a fast codec works."""


class Damaged(Exception):
    """What was read is not what was written; the message names file and offset. It must not be trained on."""


class Extent(NamedTuple):
    """What a format needs to know of the rows beforehand."""

    rows: int
    length: int
    """Tokens of a row."""
    vocabulary: int


class Codec(Protocol):
    """Compresses frames, each by itself, so that any of them can be read without the others."""

    name: str
    ending: str
    """Of files, as the codec's own tool writes it."""
    joins: bool
    """Whether frames one after the other are a file that the codec's own tool reads."""

    def learn(self, frames: Iterable[bytes], folder: Path) -> None:
        """See the frames before they are compressed, and keep in ``folder`` what reading wants of it (a dictionary)."""

    def remember(self, folder: Path) -> None:
        """Take up what ``learn`` kept, before reading."""

    def compress(self, raw: bytes) -> bytes: ...

    def decompress(self, stored: Buffer, raw_bytes: int) -> bytes:
        """The frame; never more than a little over ``raw_bytes`` is made, whatever ``stored`` holds.

        Raises:
            Damaged: if it is not a frame of this codec, or one of another size.
        """

    def decompress_all(self, stored: Sequence[Buffer], raw_bytes: Sequence[int]) -> bytes:
        """Several frames, one after the other: for small ones a call for each takes longer than its work.

        Raises:
            Damaged: if any is not what ``decompress`` takes; it need not say which, nor heed what follows a frame
                within its bytes.
        """


class Layout(Protocol):
    """Rows of token ids as bytes."""

    @property
    def name(self) -> str: ...

    def type(self, extent: Extent) -> Type:
        """Of ids that are unpacked."""

    def bytes_per_row(self, extent: Extent) -> int: ...

    def pack(self, rows: Ids, extent: Extent) -> bytes: ...

    def unpack(self, raw: Buffer, extent: Extent) -> Ids: ...


Read: TypeAlias = "Callable[[range], Ids]"
"""The rows of frames that follow each other, by their numbers; they are read in any order and from any thread."""


class Format(Protocol):
    """A way to keep frames of rows in a folder."""

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        """Keep the frames; whatever interrupts it leaves nothing that ``open`` would take for whole."""

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Read:
        """Ready to read; nothing is decompressed yet.

        Raises:
            Damaged: if what is there is not whole.
        """


@dataclass(frozen=True)
class Storage:
    """What the data techniques of a stack have chosen.

    Attributes:
        reading: ``whole``: all is decoded at the start and kept; ``stream``: a few blocks at a time; ``mapped``: frames
            are pages of the file.
        frame_tokens: at most so many (a row, if it has more) are compressed and checked by themselves, and never more
            than the block by which rows are shuffled and read (see ``order``): however rows are kept, they come in the
            same order.
        padded: whether each document begins a row of its own, filled up with padding; else documents follow each other.
    """

    format: Format
    layout: Layout
    codec: Codec | None = None
    reading: Literal["whole", "stream", "mapped"] = "whole"
    frame_tokens: int = BLOCK_TOKENS
    padded: bool = False
