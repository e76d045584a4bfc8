"""Runs on disk: JSON lines, a header first, each record flushed before the next case starts."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.errors import ResultsError
from membench.record import SCHEMA_VERSION, Record


@dataclass(frozen=True)
class Run:
    """A run's header and the records that finished."""

    path: Path
    header: dict[str, Any]
    records: tuple[Record, ...]


class RunFile:
    """Appends records to a run's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> RunFile:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{path.parent}: no folder for results: {error.strerror}") from None
        created = cls(path)
        created._write({"schema": SCHEMA_VERSION, **header})
        return created

    def append(self, record: Record) -> None:
        """Write a record and wait until it is on the disk."""
        self._write(dataclasses.asdict(record))

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left half written."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_run(path: str | Path) -> Run:
    """Read a run; a half-written last line (a runner killed while writing) is passed over.

    Raises:
        ResultsError: naming file and line, if the file is no run or of a newer schema.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError:
            raise ResultsError(f"{path}, line {number}: not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("schema"), int):
            raise ResultsError(f"{path}, line {number}: no membench record ('schema' is missing)")
        if entry["schema"] > SCHEMA_VERSION:
            raise ResultsError(f"{path}, line {number}: schema {entry['schema']} is newer than {SCHEMA_VERSION}")
        entries.append(entry)
    if not entries or "run" not in entries[0]:
        raise ResultsError(f"{path}: not the results of a run (no header)")
    try:
        records = tuple(_record(entry) for entry in entries[1:])
    except TypeError as error:
        raise ResultsError(f"{path}: a record does not fit schema {SCHEMA_VERSION}: {error}") from None
    return Run(path, entries[0], records)


def _record(entry: dict[str, Any]) -> Record:
    """JSON knows no tuples; a record holds nothing else."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Record(**{"notes": (), **fields})


def newest_run(folder: Path, suite: str = "*") -> Path:
    """The run written last in a folder, of one suite or of any.

    Raises:
        ResultsError: if there is none.
    """
    runs = sorted(folder.glob(f"{suite}-*.jsonl" if suite != "*" else "*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ResultsError(f"{folder}: no run there; 'membench run quickstart' makes one")
    return runs[-1]
