"""In which order rows are read: shuffled, but so that a reader needs a few blocks of neighbours at a time.

The order depends on nothing but the rows and the seed: however the rows are kept, and whether they are read whole or
streamed, the batches are the same. Several processes share the windows out among them, and give another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from membench.plugins import storage

if TYPE_CHECKING:
    import numpy

    from membench.plugins.storage import Extent, Storage


class Window(NamedTuple):
    """Frames of some blocks, each block's in a row, and the order of the rows in all of them."""

    blocks: list[range]
    order: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]


def block_rows(length: int) -> int:
    """Rows of a block, so many tokens long each: about 1,048,576 tokens."""
    return power_of_two(storage.BLOCK_TOKENS // length)


def power_of_two(most: int) -> int:
    """The largest that is no more than ``most``, and at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def frame_rows(kept: Storage, extent: Extent) -> int:
    """Rows of a frame: a power of two, as those of a block are, so that a block is so many whole frames."""
    return min(block_rows(extent.length), power_of_two(kept.frame_tokens // extent.length))


def windows(extent: Extent, frame_rows: int, blocks_at_once: int, seed: int, epoch: int) -> Iterator[Window]:
    """An epoch: blocks in random order, so many of them at once, and their rows shuffled together.

    Args:
        frame_rows: so many rows are kept as one frame; a block has some of them, all whole but the very last.
    """
    import numpy

    random = numpy.random.default_rng((seed, epoch))
    rows, inside = extent.rows, block_rows(extent.length)
    blocks = [range(start, min(start + inside, rows)) for start in range(0, rows, inside)]
    order = random.permutation(len(blocks)).tolist()
    for start in range(0, len(blocks), blocks_at_once):
        some = [blocks[number] for number in order[start : start + blocks_at_once]]
        frames = [range(block.start // frame_rows, -(-block.stop // frame_rows)) for block in some]
        yield Window(frames, random.permutation(sum(map(len, some))))
