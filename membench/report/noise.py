"""What A/A repeats showed, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from membench.records.disturbed_times import WHY, is_disturbed
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record, metrics_in
from membench.regression.noise import Noise
from membench.report.table_formats import DEFAULT, FORMATS
from membench.suite.tolerances import DEFAULTS

_WATCHED = frozenset(tolerance.metric.name for tolerance in DEFAULTS)


def table(records: Sequence[Record], noise: Noise, form: str = DEFAULT) -> str:
    """A row a case and metric: the median, how far apart repeats were, and below which a difference means nothing.

    For reading: the metrics that are watched by default. In a flat format: all, in bytes and seconds.
    """
    rows = list(_rows(records, noise))
    style = FORMATS[form]
    if style.is_flat:
        return style.render(rows)
    shown = [
        {"case": style.cell(row["case"]), **_shown(row), "note": style.cell(row["reason"] or "")}
        for row in rows
        if row["metric"] in _WATCHED
    ]
    return style.render(shown)


def _rows(records: Sequence[Record], noise: Noise) -> Iterator[dict[str, Any]]:
    for case_id in dict.fromkeys(record.id for record in records):
        repeats = [record for record in records if record.id == case_id]
        for metric in metrics_in(repeats):
            if not any(metric.field in record.metrics for record in repeats):
                continue
            values = [
                value
                for record in repeats
                if record.status == "ok"
                and not is_disturbed(record, metric.field)
                and (value := record.metrics.get(metric.field)) is not None
            ]
            spread = noise.spreads.get(case_id, {}).get(metric.field)
            yield {
                "case": case_id,
                "metric": metric.name,
                "field": metric.field,
                "repeats": len(values),
                "median": statistics.median(values) if values else None,
                "range": spread.range if spread else None,
                "noise": spread.floor if spread else None,
                "reason": None if spread else _reason(metric, repeats, len(values)),
            }


def _reason(metric: Metric, repeats: Sequence[Record], known: int) -> str:
    """Why there is no spread."""
    ends: set[str] = {record.status for record in repeats if record.status != "ok"}
    if any(record.status == "ok" and is_disturbed(record, metric.field) for record in repeats):
        ends.add(WHY)
    why = ", ".join(sorted(ends)) or next(
        (record.reasons[metric.field] for record in repeats if metric.field in record.reasons), "not known"
    )
    return f"known of {known} of {len(repeats)} repeats, two are needed: {why}"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    metric = METRIC_OF_FIELD[row["field"]]
    known = row["range"] is not None
    share = f"{row['noise'] / abs(row['median']) * 100:.2f}%" if known and row["median"] else "–"
    return {
        "metric": row["metric"],
        "repeats": str(row["repeats"]),
        "median": "–" if row["median"] is None else metric.format(row["median"]),
        "range": metric.format(row["range"]) if known else "–",
        "noise": metric.format(row["noise"]) if known else "–",
        "of median": share,
    }
