"""One flat table with a row a case, for programs: CSV and JSON, in bytes and seconds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence

from membench.errors import one_line
from membench.records.comparison import Comparison
from membench.records.record import Record
from membench.report.outcomes import said_of, status_of, worst_of


def flat_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """Return a row per case with every metric, unrounded; ``None`` is not known."""
    found = Comparison(records)
    rows: list[dict[str, object]] = []
    for group in found.groups:
        for technique in found.techniques(group):
            repeats = found.repeats(group, technique)
            row: dict[str, object] = {"case": repeats[0].id, "status": status_of(repeats),
                                      "message": "; ".join(said_of(worst_of(repeats)))}  # fmt: skip
            for metric in found.metrics:
                row[metric.field] = found.value(group, technique, metric.field)
                if metric.has_ratio:
                    row[f"{metric.name}_ratio"] = found.ratio(group, technique, metric.field)
            rows.append(row)
    return rows


def written(rows: Sequence[Mapping[str, object]], form: str) -> str:
    """Format rows as ``csv`` or ``json``."""
    if form == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue().rstrip()


def _harmless(value: object) -> object:
    """Escape a cell that a spreadsheet would take for a formula, or a terminal for a command."""
    if not isinstance(value, str):
        return value
    return f"'{one_line(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else one_line(value)
