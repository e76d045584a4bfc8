"""The ranks of a record: which of its processes they are."""

from __future__ import annotations

from collections.abc import Sequence

from membench.host.device import Device
from membench.protocol.readings import LAUNCHED_RANK, ProcessReading
from membench.records.record import Record


def ranks_of(record: Record) -> Sequence[ProcessReading]:
    """Return the ranks of a case; none for a case that is not in ranks.

    Where a program has started them itself they are beside the program's own process, else they are all processes.
    """
    launched = [process for process in record.processes if process.role == LAUNCHED_RANK]
    return launched or (record.processes if is_in_ranks(record) else ())


def is_in_ranks(record: Record) -> bool:
    """Whether a case has several processes, or one that was written as a rank (``1xcuda``)."""
    if len(record.processes) > 1:
        return True
    try:
        return Device.parse(str(record.case.get("device"))).in_ranks
    except ValueError:
        return False
