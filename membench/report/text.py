"""Records as a table, and a line a technique on what it saved and what it cost."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tabulate

from membench.compare import Comparison, Group, prefixes
from membench.record import METRICS, REFERENCE, Metric, Record
from membench.units import format_bytes, format_ratio, format_seconds

_SHOWN = tuple(metric for metric in METRICS if metric.in_table)

# A ratio that is nearer to one than this is neither a gain nor a loss.
_SAME = 0.005

# A figure is marked as approximate if its source may be off by more than this share of it.
_COARSE = 0.05


def comparison(records: Sequence[Record], form: str = "simple", width: int | None = None) -> str:
    """A row a case, each figure with its ratio to the reference; under a stack a row for what each member adds.

    For reading: a table for each model, workload and device, with the columns that have a figure there. As ``csv`` and
    ``json``: one flat table with bytes and seconds, ids and ratios apart.

    Args:
        width: of the terminal in characters; a table that is wider goes on below with its other columns.
    """
    found = Comparison(records)
    if form in ("csv", "json"):
        return _flat(found, form)
    tables = []
    for group in found.groups:
        rows = list(_rows(found, group, [metric for metric in _SHOWN if _is_known(found, group, metric)]))
        tables.append("\n\n".join([" · ".join(group), *_fitting(rows, form, width)]))
    return "\n\n".join(tables)


def _is_known(found: Comparison, group: Group, metric: Metric) -> bool:
    return any(found.value(group, technique, metric.field) is not None for technique in found.techniques(group))


def _rows(found: Comparison, group: Group, metrics: Sequence[Metric]) -> Iterator[dict[str, str]]:
    techniques, front = found.techniques(group), found.front(group)
    has_stacks = any("+" in technique for technique in techniques)
    for technique in techniques:
        row = {"technique": technique, "status": _status(found.repeats(group, technique))}
        for metric in metrics:
            row[metric.title] = _figure(found, group, technique, metric)
        if len(techniques) > 1:
            row["Pareto"] = "●" if technique in front else ""
        if has_stacks:
            together = found.interaction(group, technique, "peak_live_bytes") if "+" in technique else None
            row["together"] = "" if together is None else format_ratio(together)
        yield row
        if "+" in technique:
            yield from _marginal_rows(found, group, technique, row, metrics)


def _marginal_rows(
    found: Comparison, group: Group, stack: str, whole: Mapping[str, str], metrics: Sequence[Metric]
) -> Iterator[dict[str, str]]:
    """What each member adds: its prefix of the stack over the prefix before it."""
    before = REFERENCE
    for member, prefix in zip(stack.split("+"), prefixes(stack), strict=True):
        row = dict.fromkeys(whole, "")
        row["technique"] = f"· {'+' if before != REFERENCE else ''}{member}"
        for metric in metrics:
            ratio = found.ratio(group, prefix, metric.field, before)
            row[metric.title] = "" if ratio is None else format_ratio(ratio)
        before = prefix
        yield row


def _figure(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    value = found.value(group, technique, metric.field)
    if value is None:
        return "–"
    shown = metric.format(value)
    if metric.field == "lost_bits_per_byte":
        error = found.value(group, technique, "lost_bits_per_byte_standard_error")
        shown += "" if error is None else f" ±{error:.4f}"
    resolution = found.repeats(group, technique)[0].obtained.get(metric.field, {}).get("resolution_bytes", 0)
    about = "~" if resolution > _COARSE * value else ""
    ratio = found.ratio(group, technique, metric.field)
    return f"{about}{shown}" if ratio is None or technique == REFERENCE else f"{about}{shown} {format_ratio(ratio)}"


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


def _flat(found: Comparison, form: str) -> str:
    rows: list[dict[str, object]] = []
    for group in found.groups:
        for technique in found.techniques(group):
            repeats = found.repeats(group, technique)
            row: dict[str, object] = {"case": repeats[0].id, "status": _status(repeats),
                                      "message": "; ".join(_said(_worst(repeats)))}  # fmt: skip
            for metric in METRICS:
                row[metric.field] = found.value(group, technique, metric.field)
                if metric.has_ratio:
                    row[f"{metric.name}_ratio"] = found.ratio(group, technique, metric.field)
            rows.append(row)
    if form == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip()


def explanation(records: Sequence[Record], form: str = "simple") -> str:
    """Every metric of every case, and of a stack what each member changes: a table a case, a row a metric."""
    found = Comparison(records)
    tables = []
    for group in found.groups:
        for technique in found.techniques(group):
            if technique == REFERENCE:
                continue
            chain = [REFERENCE, *prefixes(technique)]
            rows = []
            for metric in METRICS:
                if not _is_known(found, group, metric):
                    continue
                row = {"metric": metric.title}
                for before, step in zip([None, *chain], chain, strict=False):
                    value = found.value(group, step, metric.field)
                    ratio = found.ratio(group, step, metric.field, before) if before else None
                    shown = "–" if value is None else metric.format(value)
                    row[step] = shown if ratio is None else f"{shown} {format_ratio(ratio)}"
                if "+" in technique:
                    together = found.interaction(group, technique, metric.field)
                    row["together"] = "" if together is None else format_ratio(together)
                rows.append(row)
            for category, sizes in _breakdown(found, group, chain).items():
                rows.append({"metric": f"at the peak: {category}", **sizes})
            table = tabulate.tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)
            tables.append(f"{found.repeats(group, technique)[0].id}\n\n{table}")
    return "\n\n".join(tables)


def _breakdown(found: Comparison, group: Group, chain: Sequence[str]) -> dict[str, dict[str, str]]:
    """By category, what held live memory at the highest moment of a step, of each case of a chain."""
    categories: dict[str, dict[str, str]] = {}
    for technique in chain:
        for record in found.repeats(group, technique)[:1]:
            for process in record.processes:
                for category, size in (process.get("breakdown_bytes") or {}).items():
                    categories.setdefault(category, {})[technique] = format_bytes(size)
    return categories


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


def _worst(repeats: Sequence[Record]) -> Record:
    return next((record for record in repeats if record.status != "ok"), repeats[0])


def _status(repeats: Sequence[Record]) -> str:
    worst = _worst(repeats)
    if worst.status != "ok":
        return worst.status
    if any(record.broken_limits for record in repeats):
        return "over limit"
    return "ok, see below" if any(record.remarks for record in repeats) else "ok"


def _said(record: Record) -> list[str]:
    """What is to be said of a record in words."""
    said = []
    if record.status != "ok":
        where = f" in {record.ended_in}" if record.ended_in else ""
        said.append(f"{record.status}{where}: {record.message}")
    return [*said, *record.broken_limits, *record.remarks, *record.notes]


def remarks(records: Sequence[Record]) -> list[str]:
    """What must be said of cases: bad ends, broken limits, remarks, notes, converting that costs more than running."""
    found = Comparison(records)
    lines = []
    for record in records:
        lines += [f"{record.id}: {text}" for text in _said(record)]
        converting = record.metrics.get("apply_peak_live_bytes")
        running = found.value(record.group, REFERENCE, "peak_live_bytes")
        if record.repeat == 0 and converting is not None and running is not None and converting > running:
            lines.append(
                f"{record.id}: converting takes {format_bytes(converting)} of live memory,"
                f" more than running the original ({format_bytes(running)})"
            )
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """One line a technique: what it saved and what it cost, from the smallest ratio over its cases to the largest."""
    found = Comparison([record for record in records if record.status == "ok"])
    ratios: dict[str, dict[str, list[float]]] = {}
    losses: dict[str, list[float]] = {}
    for group in found.groups:
        for technique in found.techniques(group):
            if technique == REFERENCE:
                continue
            for metric in _SHOWN:
                ratio = found.ratio(group, technique, metric.field)
                if ratio is not None:
                    ratios.setdefault(technique, {}).setdefault(metric.name, []).append(ratio)
            loss = found.value(group, technique, "lost_bits_per_byte")
            if loss is not None:
                losses.setdefault(technique, []).append(loss)
    lines = []
    for technique, of_metric in ratios.items():
        said: dict[str, list[str]] = {"saved": [], "cost": [], "mixed": []}
        for metric in _SHOWN:
            values = of_metric.get(metric.name, [])
            gains = [value < 1 if metric.better == "lower" else value > 1 for value in values if abs(value - 1) > _SAME]
            if gains:
                shown = " to ".join(dict.fromkeys((format_ratio(min(values)), format_ratio(max(values)))))
                kind = "saved" if all(gains) else "mixed" if any(gains) else "cost"
                said[kind].append(f"{metric.title} {shown}")
        if technique in losses:
            lost = dict.fromkeys(f"{value:+.4f}" for value in (min(losses[technique]), max(losses[technique])))
            said["cost"].append(f"{' to '.join(lost)} bits/byte")
        mixed = f"; depends on the case: {', '.join(said['mixed'])}" if said["mixed"] else ""
        saved, cost = (", ".join(said[kind]) or "nothing" for kind in ("saved", "cost"))
        lines.append(f"{technique}: saved {saved}; cost {cost}{mixed}")
    return lines
