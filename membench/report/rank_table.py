"""What each rank of a case takes, as a table: a row a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from membench.errors import MembenchError, one_line
from membench.protocol.readings import PhaseReading
from membench.records.disturbance import steps_are_disturbed
from membench.records.ranks import ranks_of
from membench.records.record import Record
from membench.records.run_file import Run
from membench.records.waiting_share import wait_percent
from membench.report.cells import SIGNS
from membench.report.outcomes import end_of
from membench.report.table_formats import DEFAULT, FORMATS
from membench.units import PERCENT, format_bytes

_HELD = ("weights", "gradients", "optimizer", "activations", "communication")
"""The categories of what held the memory at the highest moment of a step that have a column."""
_TITLES = {
    "live_peak_bytes": "live peak",
    "live_held_bytes": "live held",
    **{f"{category}_bytes": category for category in _HELD},
    "footprint_peak_bytes": "footprint peak",
    "wait_percent": "waiting",
}


def ranks_of_runs(runs: Sequence[Run], form: str = DEFAULT) -> str:
    """Format the ranks of each case of runs that has several; of several runs each table, or row, names its run.

    Raises:
        MembenchError: if no case has ranks.
    """
    style = FORMATS[form]
    shown = [(run, [record for record in run.records if ranks_of(record)]) for run in runs]
    shown = [(run, records) for run, records in shown if records]
    if not shown:
        raise MembenchError(f"no case in {', '.join(str(run.path) for run in runs)} ran on ranks, as on device 2xcpu")
    if style.is_flat:
        return style.render([
            {"run": run.header.get("run"), **row} if len(runs) > 1 else row
            for run, records in shown for record in records for row in _rows(record)
        ])  # fmt: skip
    tables = []
    for run, records in shown:
        named = f"{style.title(str(run.header.get('run')))}\n\n" if len(runs) > 1 else ""
        tables.append(f"{named}{ranks(records, form)}")
    return "\n\n".join(tables)


def ranks(records: Sequence[Record], form: str = DEFAULT) -> str:
    """Format a table a case, a row a rank, without columns that are unknown; sizes above each rank's own baseline."""
    style, tables = FORMATS[form], []
    for record in records:
        rows = list(_rows(record))
        known = [field for field in _TITLES if any(row[field] is not None for row in rows)]
        has_parts = any(row["part"] is not None for row in rows)
        shown = [
            {
                "rank": str(row["rank"]),
                **({"highest in": style.cell(row["part"] or "–")} if has_parts else {}),
                **{_TITLES[field]: _shown(row, field) for field in known},
            }
            for row in rows
        ]
        tables.append("\n\n".join([style.title(f"{record.id} · {end_of(record)}"), style.render(shown)]))
    return "\n\n".join(tables)


def _shown(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if value is None:
        return "–"
    show: Callable[[float], str] = PERCENT.format if field == "wait_percent" else format_bytes
    if field == "wait_percent":
        return f"{'~' if row['disturbed'] else ''}{SIGNS['at most']}{show(value)}"
    return f"{SIGNS.get(str(row.get(field.replace('_bytes', '_bound'))), '')}{show(value)}"


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    """Yield a row a rank, in bytes and percent; ``None`` is not known."""
    for process in ranks_of(record):
        run = process.phase("run")
        timed = process.phases[0] if process.includes_interpreter and process.phases else process.phase("time")
        held = (process.breakdown_bytes or {}).get(process.peak_part or "", {})
        yield {
            "case": record.id, "repeat": record.repeat, "status": end_of(record), "rank": process.rank,
            "device": one_line(process.device), "part": None if not held else one_line(str(process.peak_part)),
            "live_peak_bytes": run and run.live_peak_bytes, "live_held_bytes": run and run.live_held_bytes,
            **{f"{category}_bytes": held.get(category) for category in _HELD},
            "footprint_peak_bytes": timed and _footprint(timed),
            "wait_percent": wait_percent(process.durations_s, process.slept_s, process.waited_s, process.passive),
            "disturbed": steps_are_disturbed(process),
            "live_peak_bound": None if run is None else _bound(record, "peak_live_bytes"),
            "footprint_peak_bound": None if timed is None else timed.bound or _bound(record, "peak_footprint_bytes"),
        }  # fmt: skip


def _bound(record: Record, field: str) -> str | None:
    """Return how well a case's figure is known, which is no better than that of any rank; ``None``: exactly."""
    bound = record.obtained.get(field, {}).get("bound")
    return None if bound == "exact" else bound


def _footprint(phase: PhaseReading) -> int | None:
    """What a rank took from the machine: on a GPU what NVML saw, else the kernel's peak of the process."""
    if phase.gpu_process_peak_bytes is not None or phase.gpu_used_peak_bytes is not None:
        return phase.gpu_used_peak_bytes if phase.gpu_process_peak_bytes is None else phase.gpu_process_peak_bytes
    return phase.peak_footprint_bytes
