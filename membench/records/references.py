"""References of cases in ranks, which run on a single device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from membench.protocol.case import REFERENCE, Group, reference_group
from membench.records.record import Record

_PEAK, _TOTAL = "peak_live_bytes", "total_peak_live_bytes"


def beside_ranks(record: Record) -> Record:
    """Return a record of a single device as cases in ranks are compared with it: its own peak is the total, too."""
    if record.metrics.get(_PEAK) is None:
        return record
    return dataclasses.replace(
        record,
        metrics={**record.metrics, _TOTAL: record.metrics[_PEAK]},
        obtained={**record.obtained, _TOTAL: record.obtained.get(_PEAK, {})},
    )


def references_of(groups: Mapping[Group, Sequence[Record]]) -> dict[Group, list[Record]]:
    """Return the records that each group's ratios refer to.

    Args:
        groups: all records, by group.
    """
    own = {group: [record for record in records if record.technique == REFERENCE] for group, records in groups.items()}
    found = {}
    for group, references in own.items():
        of = reference_group(group)
        found[group] = references if of == group or references else [beside_ranks(each) for each in own.get(of, ())]
    return {group: references for group, references in found.items() if references}
