"""Records as lines of a run's file that readers take: what they would refuse is left out, and the record is failed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from membench.errors import ResultsError, one_line, summary
from membench.protocol.readings import ProcessReading
from membench.records.encoding import as_json
from membench.records.record import Record
from membench.records.schema import check_record, check_version
from membench.records.strict_json import parsed
from membench.records.validation import shortened, shown
from membench.units import LARGEST_VALUE

LONGEST_LINE_BYTES = 2**29
"""Larger than any record, which is largest with the durations of each part of the most steps a suite may have."""

_MOST_TOLD = 3
_LONGEST_PROBLEM = 300
_PARTS = (
    "ended_in", "duration_s", "reasons", "obtained", "remarks", "notes", "broken_limits", "unchecked_limits",
    "timeline", "output_tail", "machine", "settings",
)  # fmt: skip


def encoded(entry: Mapping[str, Any]) -> bytes:
    """Encode an entry of a run's file as a line.

    Raises:
        ValueError, TypeError, RecursionError: if JSON cannot represent it.
    """
    text = json.dumps(entry, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # File names in messages may contain invalid characters, which readers refuse.
    return text.encode(errors="replace") + b"\n"


def keepable(record: Record) -> tuple[Record, bytes]:
    """Return a record and its line in a run's file.

    A record that no reader would take becomes a ``failed`` one of the same job. It keeps all that a reader takes, and
    its message names what was left out and the plug-in that it is from.

    Raises:
        ResultsError: if not even the names of the job can be kept.
    """
    try:
        return record, _checked_line(record)
    except Exception as error:  # a plug-in may have put any object into it
        problem = _told(error, "record")
    try:
        kept = _Kept(record, problem).mended()
        return kept, _checked_line(kept)
    except Exception:
        raise ResultsError(f"the record of {one_line(str(record.id))} cannot be kept: {problem}") from None


def _checked_line(record: Record) -> bytes:
    """Return the line of a record that a reader takes.

    Raises:
        Exception: if no reader would take it.
    """
    line = encoded(as_json(record))
    if len(line) > LONGEST_LINE_BYTES:
        raise ResultsError("longer than any record")
    check_record(check_version(parsed(line)))
    return line


class _Kept:
    """A failed record in place of one that no reader takes, to which the acceptable parts of the latter are added."""

    def __init__(self, refused: Record, problem: str) -> None:
        self._refused, self._problem = refused, problem
        self._problems: list[str] = []
        process = ProcessReading(role="worker", rank=0, device=refused.case["device"].rpartition("x")[2], phases=())
        self._record = dataclasses.replace(
            refused, case=_plain(refused.case), status="failed", ended_in=None, message=None, duration_s=0.0,
            metrics={}, reasons={}, obtained={}, processes=(process,), remarks=(), notes=(), broken_limits=(),
            unchecked_limits=(),
            timeline={}, output_tail="", machine={}, settings={},
        )  # fmt: skip

    def mended(self) -> Record:
        """Add all parts that a reader takes, and a message about the others."""
        refused = self._refused
        for field, value in refused.metrics.items():
            if self._try("metrics", {**self._record.metrics, field: value}, field):
                continue
            reason = f"no reader takes it: {self._problems[-1]}"
            if self._takes(dataclasses.replace(self._record, metrics={**self._record.metrics, field: None})):
                self._record = dataclasses.replace(
                    self._record,
                    metrics={**self._record.metrics, field: None},
                    reasons={**self._record.reasons, field: reason},
                )  # fmt: skip
        reasons = {**refused.reasons, **self._record.reasons}
        obtained = {
            field: how for field, how in refused.obtained.items() if self._record.metrics.get(field) is not None
        }
        for part in _PARTS:
            known: Any = {"reasons": reasons, "obtained": obtained}.get(part, getattr(refused, part))
            self._try(part, known)
        self._add_processes()
        problems = self._problems or [self._problem]
        more = f" (and {len(problems) - _MOST_TOLD} more)" if len(problems) > _MOST_TOLD else ""
        said = f"; before that: {one_line(str(refused.message))}" if refused.message else ""
        message = f"what was read cannot be kept: {'; '.join(problems[:_MOST_TOLD])}{more}{said}"
        return dataclasses.replace(self._record, message=message)

    def _add_processes(self) -> None:
        found: list[ProcessReading] = []
        for number, process in enumerate(self._refused.processes):
            if self._try("processes", (*found, process)):
                found.append(process)
                continue
            device = self._record.processes[0].device
            kept = ProcessReading(role="worker", rank=number, device=device, phases=())
            for field in dataclasses.fields(process):
                if field.name != "phases":
                    kept = self._with(found, kept, **{field.name: getattr(process, field.name)})
            for phase in process.phases:
                kept = self._with(found, kept, phases=(*kept.phases, phase))
            found.append(kept)
            self._record = dataclasses.replace(self._record, processes=tuple(found))

    def _with(self, others: Iterable[ProcessReading], process: ProcessReading, **known: Any) -> ProcessReading:
        """Return a process with more of what was read of it, if a reader takes that."""
        trial = dataclasses.replace(process, **known)
        return trial if self._takes(dataclasses.replace(self._record, processes=(*others, trial))) else process

    def _try(self, part: str, value: Any, field: str = "") -> bool:
        """Add a part, or the reason why no reader takes it to the problems; return whether it was added."""
        trial = dataclasses.replace(self._record, **{part: value})
        try:
            _checked_line(trial)
        except Exception as error:
            where = f"{part}.{shortened(field)} = {shown(value[field])}" if field else part
            self._problems.append(_told(error, where) + _of_plugin(self._refused.case, field))
            return False
        self._record = trial
        return True

    def _takes(self, record: Record) -> bool:
        try:
            _checked_line(record)
        except Exception:
            return False
        return True


def _told(error: Exception, where: str) -> str:
    """Return the reason why no reader takes something; a ``ResultsError`` names the key by itself."""
    text = str(error) if isinstance(error, ResultsError) else f"{where}: {summary(error)}"
    return one_line(text[:_LONGEST_PROBLEM])


def _of_plugin(case: Mapping[str, Any], field: str) -> str:
    plugin = case.get("metric_plugins", {}).get(field)
    return f" (from metric '{plugin['use']}')" if plugin else ""


def _plain(value: Any) -> Any:
    """Convert a value to JSON: what JSON cannot represent becomes text."""
    match value:
        case None | bool() | str():
            return value
        case int() | float() if abs(value) < LARGEST_VALUE:  # not if it is NaN
            return value
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
    return repr(value)[:_LONGEST_PROBLEM]
