"""Which figures of quality may be compared: those that were judged over the same held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from membench.records.metrics import METRIC_OF_FIELD, is_of_held_out_text
from membench.records.record import Record

OTHER_TEXT = "quality was judged over fewer pieces of held-out text in one of them, for want of time"


def judged_tokens(records: Sequence[Record]) -> list[int]:
    """Return the numbers of tokens that quality was judged over, where time sufficed for fewer than all; else none."""
    readings = [process.quality for record in records for process in record.processes if process.quality is not None]
    if not any(quality.all_pieces is not None for quality in readings):
        return []
    return sorted({sum(quality.tokens) for quality in readings if quality.tokens})


def are_of_other_text(field: str, first: Sequence[Record], second: Sequence[Record]) -> bool:
    """Whether values of a metric are of different pieces of text, so that their ratio says nothing about quality.

    Distances from the reference are judged over the pieces that both have.
    """
    metric = METRIC_OF_FIELD[field]
    if not is_of_held_out_text(metric) or metric.of_reference is not None or not metric.has_difference:
        return False
    return judged_tokens(first) != judged_tokens(second)
