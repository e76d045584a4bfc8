"""Records as a table, and a line a technique on what it saved and what it cost."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence

import tabulate

from membench.record import METRICS, Record
from membench.units import format_ratio

FORMATS = ("simple", "github", "csv", "json", "latex", "html", "plain", "grid")

_SHOWN = tuple(metric for metric in METRICS if metric.in_table)


def median(records: Iterable[Record], field: str) -> float | None:
    """The median of a metric over a case's repeats; ``None`` if none has it."""
    values = [value for record in records if (value := record.metrics.get(field)) is not None]
    return statistics.median(values) if values else None


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    cases: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.group, r.technique != "none")):
        cases.setdefault(record.id, []).append(record)
    return cases


def _reference(cases: dict[str, list[Record]], record: Record) -> list[Record]:
    model, workload, device = record.group
    return cases.get(f"{model}/none/{workload}/{device}", [])


def comparison(records: Sequence[Record], form: str = "simple") -> str:
    """A row a case, grouped by model, workload and device, each figure with its ratio to the reference."""
    cases = _by_case(records)
    raw = form in ("csv", "json")
    rows: list[dict[str, object]] = []
    for id, repeats in cases.items():
        first = repeats[0]
        row: dict[str, object] = {"case": id, "status": _status(repeats, raw)}
        for metric in _SHOWN:
            value = median(repeats, metric.field)
            base = median(_reference(cases, first), metric.field)
            ratio = value / base if value is not None and base else None
            if raw:
                row[metric.field] = value
                row[f"{metric.field.rpartition('_')[0]}_ratio"] = ratio
            elif value is None:
                row[metric.title] = "–"
            else:
                size = metric.format(round(value) if metric.field.endswith("_bytes") else value)
                with_ratio = ratio is not None and first.technique != "none"
                row[metric.title] = f"{size} {format_ratio(ratio)}" if with_ratio and ratio is not None else size
        rows.append(row)
    if form == "json":
        return json.dumps(rows, indent=2)
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().rstrip()
    return tabulate.tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)


def _status(repeats: list[Record], raw: bool) -> str:
    worst = next((record for record in repeats if record.status != "ok"), repeats[0])
    if raw or worst.status != "ok":
        return worst.status
    if any(record.broken_limits for record in repeats):
        return "over limit"
    return "ok, no effect" if any(record.remarks for record in repeats) else "ok"


def remarks(records: Sequence[Record]) -> list[str]:
    """A line for each case that did not end well, broke a limit or holds a remark."""
    lines = []
    for record in records:
        if record.status != "ok":
            where = f" in {record.ended_in}" if record.ended_in else ""
            lines.append(f"{record.id}: {record.status}{where}: {record.message}")
        lines += [f"{record.id}: {text}" for text in (*record.broken_limits, *record.remarks)]
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """One line a technique: what it saved and what it cost, as medians of the ratios over its cases."""
    cases = _by_case([record for record in records if record.status == "ok"])
    ratios: dict[str, dict[str, list[float]]] = {}
    for repeats in cases.values():
        technique = repeats[0].technique
        if technique == "none":
            continue
        for metric in _SHOWN:
            value, base = median(repeats, metric.field), median(_reference(cases, repeats[0]), metric.field)
            if value is not None and base:
                ratios.setdefault(technique, {}).setdefault(metric.name, []).append(value / base)
    lines = []
    for technique, found in ratios.items():
        saved: list[str] = []
        cost: list[str] = []
        for metric in _SHOWN:
            if metric.name not in found:
                continue
            ratio = statistics.median(found[metric.name])
            text = f"{metric.title} {format_ratio(ratio)}"
            gain = ratio < 0.995 if metric.better == "lower" else ratio > 1.005
            loss = ratio > 1.005 if metric.better == "lower" else ratio < 0.995
            (saved if gain else cost if loss else []).append(text)
        lines.append(f"{technique}: saved {', '.join(saved) or 'nothing'}; cost {', '.join(cost) or 'nothing'}")
    return lines
