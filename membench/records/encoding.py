"""Encoding of records as JSON, and decoding, which also upgrades records that earlier versions wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from membench.protocol.readings import ProcessReading, outer_phase, plain
from membench.records.record import Record

_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_PROCESS = TypeAdapter(ProcessReading)


def as_json(record: Record) -> dict[str, Any]:
    """Encode a record as in a run's file."""
    return {
        **{name: getattr(record, name) for name in _FIELDS},
        "processes": [_process(process) for process in record.processes],
    }


def _process(process: ProcessReading) -> dict[str, Any]:
    """Encode the reading of a process: all its fields, and of its phases the fields that are known."""
    names = (field.name for field in dataclasses.fields(process))
    known = {name: plain(getattr(process, name)) for name in names}
    if known["exit_code"] is None:  # only scripts have one
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
