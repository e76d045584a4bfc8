"""How a case ended, in words."""

from __future__ import annotations

from collections.abc import Sequence

from membench.errors import one_line
from membench.records.record import Record


def worst_of(repeats: Sequence[Record]) -> Record:
    return next((record for record in repeats if record.status != "ok"), repeats[0])


def end_of(record: Record) -> str:
    """How one measurement ended: its status, or that it is over a limit."""
    return "over limit" if record.status == "ok" and record.broken_limits else record.status


def status_of(repeats: Sequence[Record]) -> str:
    worst = worst_of(repeats)
    if worst.status != "ok":
        return worst.status
    if any(record.broken_limits for record in repeats):
        return "over limit"
    return "ok, see below" if any(record.remarks or record.unchecked_limits for record in repeats) else "ok"


def said_of(record: Record) -> list[str]:
    """Return the messages of a record: how it failed, limits broken or not checked, remarks and notes."""
    said = []
    if record.status != "ok":
        where = f" in {record.ended_in}" if record.ended_in else ""
        said.append(f"{record.status}{where}: {record.message}")
    return [
        one_line(text)
        for text in (*said, *record.broken_limits, *record.unchecked_limits, *record.remarks, *record.notes)
    ]
