"""In which order rows are read: shuffled, but so that a reader needs a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy


class Window(NamedTuple):
    """Frames to be read together, and the order of the rows in them."""

    frames: list[int]
    order: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]


def windows(rows: int, frame_rows: int, frames_at_once: int, seed: int, epoch: int) -> Iterator[Window]:
    """An epoch: frames in random order, so many of them at once, and their rows shuffled together.

    It depends on nothing but its arguments: however the rows are kept and read, the batches are the same.
    """
    import numpy

    random = numpy.random.default_rng((seed, epoch))
    count = -(-rows // frame_rows)
    order = random.permutation(count).tolist()
    for start in range(0, count, frames_at_once):
        frames = order[start : start + frames_at_once]
        inside = sum(min(frame_rows, rows - frame * frame_rows) for frame in frames)
        yield Window(frames, random.permutation(inside))
