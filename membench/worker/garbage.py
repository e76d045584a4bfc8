"""A note on memory that steps leave in reference cycles."""

from __future__ import annotations

from membench.units import format_bytes

_SMALLEST_GARBAGE_BYTES, _LARGEST_GARBAGE_SHARE = 2**20, 0.01


def note_on_garbage(garbage_bytes: int, peak_bytes: int | None) -> list[str]:
    """Return a note if a step leaves much in reference cycles, which stays until Python collects garbage.

    Args:
        garbage_bytes: the most that was freed by collecting garbage between two steps.
        peak_bytes: the live peak of a step, without garbage of earlier ones; ``None`` if it is not known.
    """
    if not peak_bytes or garbage_bytes < max(_SMALLEST_GARBAGE_BYTES, _LARGEST_GARBAGE_SHARE * peak_bytes):
        return []
    size = format_bytes(garbage_bytes)
    return [f"a step leaves {size} in reference cycles, which add up over steps until Python collects garbage"]
