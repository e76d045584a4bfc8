"""The phases of each case as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from membench.errors import one_line
from membench.protocol.readings import LAUNCHED_RANK, PartReading, PhaseReading, ProcessReading
from membench.records.disturbance import has_waited, steps_are_disturbed
from membench.records.record import Record
from membench.records.run_file import Run
from membench.report.cells import SIGNS
from membench.report.outcomes import end_of
from membench.report.table_formats import DEFAULT, FORMATS
from membench.units import format_bytes, format_seconds

_PHASE_TITLES = {
    "duration_s": "time",
    "live_peak_bytes": "live peak",
    "live_held_bytes": "live held",
    "footprint_peak_bytes": "footprint peak",
    "gpu_peak_bytes": "GPU peak",
    "file_pages_bytes": "file pages",
}


def phases_of_runs(runs: Sequence[Run], form: str = DEFAULT) -> str:
    """Format the phases of each case of runs; of several runs each table, or row of a flat table, names its run."""
    style = FORMATS[form]
    if len(runs) == 1:
        return phases(runs[0].records, form)
    if style.is_flat:
        rows = [{"run": run.header.get("run"), **row}
                for run in runs for record in run.records for row in _phase_rows(record)]  # fmt: skip
        return style.render(rows)
    return "\n\n".join(f"{style.title(str(run.header.get('run')))}\n\n{phases(run.records, form)}" for run in runs)


def phases(records: Sequence[Record], form: str = DEFAULT) -> str:
    """Format time and memory of each phase of each case, and of its parts; sizes above the worker's baseline.

    For reading: a table per case, without columns that are unknown. In a flat format: one table in bytes and
    seconds.
    """
    style = FORMATS[form]
    if style.is_flat:
        return style.render([row for record in records for row in _phase_rows(record)])
    tables = []
    for record in records:
        rows = list(_phase_rows(record))
        formats = {field: format_seconds if field == "duration_s" else format_bytes for field in _PHASE_TITLES}
        known = [field for field in _PHASE_TITLES if any(row[field] is not None for row in rows)]
        has_ranks = len(record.processes) > 1
        has_launched = any(process.role == LAUNCHED_RANK for process in record.processes)
        shown = [
            {
                **({"rank": _rank_of(row, has_launched)} if has_ranks else {}),
                "phase": style.cell(f"· {row['part']}" if row["part"] else row["phase"]),
                "allocator": style.cell(row["allocator"]),
                **{_PHASE_TITLES[field]: _or_blank(row, field, formats[field]) for field in known},
            }
            for row in rows
        ]
        tables.append("\n\n".join(filter(None, [style.title(f"{record.id} · {end_of(record)}"), style.render(shown)])))
    return "\n\n".join(tables)


def _rank_of(row: Mapping[str, Any], has_launched: bool) -> str:
    """Name the process of a row: a program that started its ranks itself is none of them."""
    return "–" if has_launched and row["role"] != LAUNCHED_RANK else str(row["rank"])


def _or_blank(row: Mapping[str, Any], field: str, show: Callable[[float], str]) -> str:
    """Format a value; a dash if a phase lacks it, blank if a part does: their memory is read in one phase only."""
    if row[field] is None:
        return "" if row["part"] else "–"
    bound = row["bound"] if field == "footprint_peak_bytes" else None
    is_rough = field == "duration_s" and row["disturbed"]
    return f"{'~' if is_rough else SIGNS.get(str(bound), '')}{show(row[field])}"


def _phase_rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yield a row per phase and a row per part of it; ``None`` is not known."""
    for process in record.processes:
        for phase in process.phases:
            rows: list[tuple[str | None, PhaseReading | PartReading]] = [(None, phase), *phase.parts.items()]
            for part, entry in rows:
                row = {
                    "duration_s": _duration_s(entry),
                    "live_peak_bytes": entry.live_peak_bytes,
                    "live_held_bytes": entry.live_held_bytes,
                    "footprint_peak_bytes": entry.peak_footprint_bytes,
                    "gpu_peak_bytes": _gpu_peak_seen(entry),
                    "file_pages_bytes": entry.file_end_bytes,
                }
                # The meter's own entry for what runs between parts says nothing that is shown here.
                if part is None or any(value is not None for value in row.values()):
                    yield {"case": record.id, "repeat": record.repeat, "status": end_of(record),
                           "role": one_line(process.role), "rank": process.rank,
                           "phase": one_line(phase.name), "part": None if part is None else one_line(part),
                           "allocator": one_line(phase.allocator), **row,
                           "disturbed": _is_disturbed(process, phase, part),
                           "bound": phase.bound if part is None else None}  # fmt: skip


def _duration_s(entry: PhaseReading | PartReading) -> float | None:
    """Duration of a phase, or of a part of a step at the median."""
    if isinstance(entry, PhaseReading):
        return entry.duration_s
    return statistics.median(entry.durations_s) if entry.durations_s else None


def _is_disturbed(process: ProcessReading, phase: PhaseReading, part: str | None) -> bool:
    """Whether other processes disturbed a phase, or the parts of a step in it."""
    if phase.name == "time" and part is not None:
        return steps_are_disturbed(process)
    return has_waited(phase.duration_s, phase.waited_s)


def _gpu_peak_seen(entry: PhaseReading | PartReading) -> int | None:
    """What NVML saw from outside, for a process whose own counters were not read: those are in its live peak."""
    if isinstance(entry, PartReading) or entry.reads_gpu_itself:
        return None
    seen = entry.gpu_process_peak_bytes
    return entry.gpu_used_peak_bytes if seen is None else seen
