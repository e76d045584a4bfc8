"""Records as a table, and a line a technique on what it saved and what it cost."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tabulate

from membench.record import METRIC_OF_FIELD, METRICS, REFERENCE, Record
from membench.units import format_bytes, format_ratio, format_seconds

_SHOWN = tuple(metric for metric in METRICS if metric.in_table)

# A ratio that is nearer to one than this is neither a gain nor a loss.
_SAME = 0.005


def median(records: Iterable[Record], field: str) -> float | None:
    """The median of a metric over a case's repeats; ``None`` if none has it."""
    values = [value for record in records if (value := record.metrics.get(field)) is not None]
    return statistics.median(values) if values else None


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    cases: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.group, r.technique != REFERENCE)):
        cases.setdefault(record.id, []).append(record)
    return cases


def _reference(cases: dict[str, list[Record]], record: Record) -> list[Record]:
    model, workload, device = record.group
    return cases.get(f"{model}/{REFERENCE}/{workload}/{device}", [])


def comparison(records: Sequence[Record], form: str = "simple", width: int | None = None) -> str:
    """A row a case, each figure with its ratio to the reference.

    For reading: a table for each model, workload and device, with the columns that have a figure there. As ``csv`` and
    ``json``: one flat table with bytes and seconds, ids and ratios apart.

    Args:
        width: of the terminal in characters; a table that is wider goes on below with its other columns.
    """
    cases = _by_case(records)
    if form in ("csv", "json"):
        return _flat(cases, form)
    tables = []
    for group in dict.fromkeys(repeats[0].group for repeats in cases.values()):
        members = [repeats for repeats in cases.values() if repeats[0].group == group]
        metrics = [metric for metric in _SHOWN if any(median(m, metric.field) is not None for m in members)]
        rows = []
        for repeats in members:
            row = {"technique": repeats[0].technique, "status": _status(repeats)}
            for metric in metrics:
                value, ratio = _with_ratio(cases, repeats, metric.field)
                shown = "–" if value is None else metric.format(value)
                is_reference = repeats[0].technique == REFERENCE
                row[metric.title] = shown if ratio is None or is_reference else f"{shown} {format_ratio(ratio)}"
            rows.append(row)
        tables.append("\n\n".join([" · ".join(group), *_fitting(rows, form, width)]))
    return "\n\n".join(tables)


def _fitting(rows: list[dict[str, str]], form: str, width: int | None) -> Iterator[str]:
    """The rows as one table, or as several that fit the width, each with the two columns that name the case."""
    naming, left = list(rows[0])[:2], list(rows[0])[2:]
    taken = len(left)
    while True:
        shown = [{column: row[column] for column in (*naming, *left[:taken])} for row in rows]
        table = tabulate.tabulate(shown, headers="keys", tablefmt=form, disable_numparse=True)
        if width is not None and taken > 1 and max(map(len, table.splitlines())) > width:
            taken -= 1
            continue
        yield table
        left = left[taken:]
        if not left:
            return
        taken = len(left)


def _with_ratio(cases: dict[str, list[Record]], repeats: list[Record], field: str) -> tuple[float | None, float | None]:
    value = median(repeats, field)
    base = median(_reference(cases, repeats[0]), field)
    has_ratio = METRIC_OF_FIELD[field].has_ratio
    return value, value / base if has_ratio and value is not None and base else None


def _flat(cases: dict[str, list[Record]], form: str) -> str:
    rows: list[dict[str, object]] = []
    for id, repeats in cases.items():
        row: dict[str, object] = {"case": id, "status": _worst(repeats).status}
        for metric in _SHOWN:
            row[metric.field], ratio = _with_ratio(cases, repeats, metric.field)
            if metric.has_ratio:
                row[f"{metric.name}_ratio"] = ratio
        rows.append(row)
    if form == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip()


def phases(records: Sequence[Record], form: str = "simple") -> str:
    """What each phase of each case took: a table a case, sizes above the worker's baseline."""
    tables = []
    for record in records:
        rows = [row for process in record.processes for phase in process["phases"] for row in _phase_rows(phase)]
        table = tabulate.tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)
        tables.append(f"{record.id} · {record.status}\n\n{table}")
    return "\n\n".join(tables)


def _phase_rows(phase: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for name, entry in ((phase["name"], phase), *((f"  {part}", e) for part, e in phase.get("parts", {}).items())):
        durations = entry.get("durations_s") or [entry.get("duration_s")]
        live = {"peak": "cuda_peak_allocated_bytes", "held": "cuda_held_allocated_bytes"}
        if "cuda_peak_allocated_bytes" not in entry:
            live = {"peak": "peak_live_bytes", "held": "held_live_bytes"}
        yield {
            "phase": name,
            "allocator": phase["allocator"],
            "time": "–" if durations[0] is None else format_seconds(statistics.median(durations)),
            "live peak": _size(entry.get(live["peak"])),
            "live held": _size(entry.get(live["held"])),
            "footprint peak": _size(entry.get("peak_footprint_bytes")),
            "file pages": _size(entry.get("file_end_bytes")),
        }


def _size(size_bytes: int | None) -> str:
    return "–" if size_bytes is None else format_bytes(size_bytes)


def _worst(repeats: list[Record]) -> Record:
    return next((record for record in repeats if record.status != "ok"), repeats[0])


def _status(repeats: list[Record]) -> str:
    worst = _worst(repeats)
    if worst.status != "ok":
        return worst.status
    if any(record.broken_limits for record in repeats):
        return "over limit"
    return "ok, see below" if any(record.remarks for record in repeats) else "ok"


def remarks(records: Sequence[Record]) -> list[str]:
    """A line for each case that did not end well, broke a limit or holds a remark."""
    lines = []
    for record in records:
        if record.status != "ok":
            where = f" in {record.ended_in}" if record.ended_in else ""
            lines.append(f"{record.id}: {record.status}{where}: {record.message}")
        lines += [f"{record.id}: {text}" for text in (*record.broken_limits, *record.remarks, *record.notes)]
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """One line a technique: what it saved and what it cost, from the smallest ratio over its cases to the largest."""
    cases = _by_case([record for record in records if record.status == "ok"])
    ratios: dict[str, dict[str, list[float]]] = {}
    for repeats in cases.values():
        technique = repeats[0].technique
        if technique == REFERENCE:
            continue
        for metric in _SHOWN:
            value, base = median(repeats, metric.field), median(_reference(cases, repeats[0]), metric.field)
            if metric.has_ratio and value is not None and base:
                ratios.setdefault(technique, {}).setdefault(metric.name, []).append(value / base)
    lines = []
    for technique, found in ratios.items():
        said: dict[str, list[str]] = {"saved": [], "cost": [], "mixed": []}
        for metric in _SHOWN:
            values = found.get(metric.name)
            if values is None:
                continue
            shown = dict.fromkeys((format_ratio(min(values)), format_ratio(max(values))))
            gains = [value < 1 if metric.better == "lower" else value > 1 for value in values if abs(value - 1) > _SAME]
            if gains:
                kind = "saved" if all(gains) else "mixed" if any(gains) else "cost"
                said[kind].append(f"{metric.title} {' to '.join(shown)}")
        mixed = f"; depends on the case: {', '.join(said['mixed'])}" if said["mixed"] else ""
        saved, cost = (", ".join(said[kind]) or "nothing" for kind in ("saved", "cost"))
        lines.append(f"{technique}: saved {saved}; cost {cost}{mixed}")
    return lines
