"""The phases of each case as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tabulate

from membench.errors import one_line
from membench.records.record import Record
from membench.report.cells import SIGNS, heading, in_cell
from membench.report.flat import written
from membench.units import format_bytes, format_seconds

_PHASE_TITLES = {
    "duration_s": "time",
    "live_peak_bytes": "live peak",
    "live_held_bytes": "live held",
    "footprint_peak_bytes": "footprint peak",
    "gpu_peak_bytes": "GPU peak",
    "file_pages_bytes": "file pages",
}


def phases(records: Sequence[Record], form: str = "simple") -> str:
    """Format time and memory of each phase of each case, and of its parts; sizes above the worker's baseline.

    For reading: a table per case, without columns that are unknown. As ``csv`` and ``json``: one flat table in bytes
    and seconds.
    """
    if form in ("csv", "json"):
        return written([row for record in records for row in _phase_rows(record)], form)
    tables = []
    for record in records:
        rows = list(_phase_rows(record))
        formats = {field: format_seconds if field == "duration_s" else format_bytes for field in _PHASE_TITLES}
        known = [field for field in _PHASE_TITLES if any(row[field] is not None for row in rows)]
        shown = [
            {
                "phase": in_cell(f"· {row['part']}" if row["part"] else row["phase"], form),
                "allocator": in_cell(row["allocator"], form),
                **{_PHASE_TITLES[field]: _or_blank(row, field, formats[field]) for field in known},
            }
            for row in rows
        ]
        table = tabulate.tabulate(shown, headers="keys", tablefmt=form, disable_numparse=True)
        tables.append("\n\n".join(filter(None, [heading(f"{record.id} · {record.status}", form), table])))
    return "\n\n".join(tables)


def _or_blank(row: Mapping[str, Any], field: str, show: Callable[[float], str]) -> str:
    """Format a value; a dash if a phase lacks it, blank if a part does: their memory is read in one phase only."""
    if row[field] is None:
        return "" if row["part"] else "–"
    bound = row["bound"] if field == "footprint_peak_bytes" else None
    return f"{SIGNS.get(str(bound), '')}{show(row[field])}"


def _phase_rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yield a row per phase and a row per part of it; ``None`` is not known."""
    for process in record.processes:
        for phase in process["phases"]:
            for part, entry in ((None, phase), *phase.get("parts", {}).items()):
                durations = entry.get("durations_s") or [entry.get("duration_s")]
                on_gpu = "cuda_peak_allocated_bytes" in entry
                row = {
                    "duration_s": None if durations[0] is None else statistics.median(durations),
                    "live_peak_bytes": entry.get("cuda_peak_allocated_bytes" if on_gpu else "peak_live_bytes"),
                    "live_held_bytes": entry.get("cuda_held_allocated_bytes" if on_gpu else "held_live_bytes"),
                    "footprint_peak_bytes": entry.get("peak_footprint_bytes"),
                    # A worker's is in its live peak; a user's program is seen from outside only.
                    "gpu_peak_bytes": _gpu_peak(entry) if process["role"] == "script" else None,
                    "file_pages_bytes": entry.get("file_end_bytes"),
                }
                # The meter's entry for the time between parts has nothing that is shown here.
                if part is None or any(value is not None for value in row.values()):
                    yield {"case": record.id, "repeat": record.repeat, "status": record.status,
                           "role": one_line(process["role"]), "rank": process["rank"],
                           "phase": one_line(phase["name"]), "part": None if part is None else one_line(part),
                           "allocator": one_line(phase["allocator"]), **row,
                           "bound": entry.get("bound")}  # fmt: skip


def _gpu_peak(entry: Mapping[str, Any]) -> int | None:
    of_process: int | None = entry.get("gpu_process_peak_bytes")
    return entry.get("gpu_used_peak_bytes") if of_process is None else of_process
