"""One flat table with a row a case, for programs, in bytes and seconds."""

from __future__ import annotations

from collections.abc import Sequence

from membench.protocol.case import REFERENCE
from membench.records.comparison import Comparison
from membench.records.record import Record
from membench.report.outcomes import said_of, status_of, worst_of


def flat_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """Return a row per case with every metric, unrounded; ``None`` is not known.

    ``times_disturbed`` says that other processes disturbed the timed steps; ratios of such times are not given, nor of
    those of ranks that share one machine's cores.
    """
    found = Comparison(records)
    rows: dict[str, dict[str, object]] = {}  # by id: a reference may be in several groups
    for group in found.groups:
        for technique in found.techniques(group):
            repeats = found.repeats(group, technique)
            row: dict[str, object] = {
                "case": repeats[0].id,
                "status": status_of(repeats),
                "message": "; ".join(said_of(worst_of(repeats))),
                "times_disturbed": found.is_disturbed(group, "step_median_s", technique),
            }
            for metric in found.metrics:
                row[metric.field] = found.value(group, technique, metric.field)
                if metric.has_ratio:
                    says_nothing = found.is_untold(group, metric.field, technique, REFERENCE)
                    ratio = None if says_nothing else found.ratio(group, technique, metric.field)
                    row[f"{metric.name}_ratio"] = ratio
            rows.setdefault(repeats[0].id, row)
    return list(rows.values())
