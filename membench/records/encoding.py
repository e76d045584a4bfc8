"""Encoding of records as JSON, and decoding, which also upgrades records that earlier versions wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from membench.protocol.readings import PhaseReading, ProcessReading, outer_phase, plain
from membench.records.record import Record

_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_PROCESS = TypeAdapter(ProcessReading)
_OBSERVED = (
    "samples", "file_peak_bytes", "children_peak_bytes", "family_rss_bytes", "family_anonymous_bytes",
    "gpu_process_peak_bytes", "gpu_used_peak_bytes", "began_s", "ended_s", "gpu_energy_j", "gpu_process_end_bytes",
    "gpu_used_end_bytes", "gpu_unknown", "peak_footprint_bytes",
)  # fmt: skip
"""Fields of a phase that are written as ``null`` if they are not known; readers of runs' files rely on them."""


def as_json(record: Record) -> dict[str, Any]:
    """Encode a record as in a run's file; a field of later versions that is empty is left out."""
    known = {name: getattr(record, name) for name in _FIELDS}
    if not record.unchecked_limits:
        del known["unchecked_limits"]
    return {**known, "processes": [_process(process) for process in record.processes]}


def _phase(phase: PhaseReading) -> dict[str, Any]:
    """Return a phase as JSON: what the observer did not see is ``null``, what a meter has no reading of is left out."""
    return {**dict.fromkeys(_OBSERVED), **plain(phase)}


def _process(process: ProcessReading) -> dict[str, Any]:
    """Encode the reading of a process: all its fields, and of its phases the fields that are known."""
    names = (field.name for field in dataclasses.fields(process))
    known = {name: plain(getattr(process, name)) for name in names}
    known["phases"] = [_phase(phase) for phase in process.phases]
    if process.quality is not None and process.quality.is_compared:
        known["quality"] = {"kl_nats": None, "top1_agreement_percent": None, **known["quality"]}
    if not process.includes_interpreter:  # only scripts have one
        del known["exit_code"]
    return known


def record_of(entry: dict[str, Any], processes: Sequence[ProcessReading] | None = None) -> Record:
    """Decode a record from a run's file. Lists become tuples; unknown keys are ignored.

    Args:
        processes: the readings of the entry's processes, if they have been decoded already.
    """
    known = {name: entry[name] for name in _FIELDS if name in entry}
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    if processes is None:
        processes = [process_of(process) for process in entry["processes"]]
    fields["processes"] = tuple(_with_nesting(process) for process in processes)
    return Record(**{"notes": (), **fields})


def process_of(entry: Mapping[str, Any]) -> ProcessReading:
    """Decode the reading of a process from a run's file."""
    return _with_nesting(_PROCESS.validate_python(entry))


def _with_nesting(process: ProcessReading) -> ProcessReading:
    """Add the nesting of a script's phases, which earlier records lack, from the names of the phases."""
    if not process.includes_interpreter or any(phase.inside for phase in process.phases):
        return process
    names = [phase.name for phase in process.phases]
    nested = [dataclasses.replace(phase, inside=outer_phase(phase.name, names)) for phase in process.phases]
    return dataclasses.replace(process, phases=nested)
