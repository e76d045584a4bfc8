"""The schema of a run's file: keys and types of its header and records, checked on reading."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from membench.errors import ResultsError
from membench.protocol.case import REFERENCE
from membench.protocol.readings import Bound, Duration, ProcessReading, SignedSize, Size
from membench.records.metric import is_own
from membench.records.metrics import is_possible_value, known_metric
from membench.records.names import checked_device, checked_name, checked_plugin, checked_stack, members
from membench.records.record import SCHEMA_VERSION, Status
from membench.records.validation import problem, shortened, shown
from membench.units import BYTES, LARGEST_SIZE

_LONGEST_TEXT = 1000

_T = TypeVar("_T", bound=BaseModel)


class _Table(BaseModel):
    """A table that accepts unknown keys, since later versions may add some."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Gpu(_Table):
    name: str | None
    memory_bytes: Size | None
    driver: str | None


class _Cpu(_Table):
    vendor: str | None = None
    family: str | None = None
    model: str | None = None
    stepping: str | None = None
    instructions: list[str] | None = None


class _Machine(_Table):
    system: str | None = None
    architecture: str | None = None
    page_bytes: Size | None = None
    processor: str | None = None
    cpu: _Cpu | None = None
    cores: Size | None = None
    memory_bytes: Size | None = None
    python: str | None = None
    packages: dict[str, str | None] | None = None
    commit: str | None = None
    threads: Size | None = None
    variables: dict[str, str | None] | None = None
    gpus: list[_Gpu] | str | None = None


class _Code(_Table):
    """The commit of the code under test; earlier runs have one only if two commits were measured in turn."""

    commit: str | None = None
    ref: str | None = None
    is_changed: bool | None = None
    committed_at: str | None = None
    reason: str | None = None


class _Header(_Table):
    run: str
    suite: str
    suite_sha256: str = ""
    suite_text: str = ""
    suite_tables: dict[str, Any] | None = None
    shard: str | None = None
    merged: list[str] = []
    devices: list[str] = []
    machine: _Machine = _Machine()
    started_at: str = ""
    code: _Code | None = None
    plugin_files: dict[str, str] = {}
    own_metrics: list[str] = []


class _Plugin(_Table):
    use: str
    options: dict[str, Any]


class _Case(_Table):
    model: str
    technique: str
    workload: str
    device: str
    model_plugin: _Plugin | None = None
    technique_plugins: list[_Plugin] = []
    part_devices: dict[str, str] = {}
    workload_plugin: _Plugin | None = None


class _How(_Table):
    source: str | None = None
    bound: Bound = "exact"
    resolution_bytes: Size = 0
    at_least_bytes: Size | None = None
    at_most_bytes: SignedSize | None = None
    off_bytes: Size | None = None
    interval_s: Duration | None = None
    children: bool | None = None
    rank: Size | None = None


class _Record(_Table):
    case: _Case
    id: str
    repeat: int = Field(ge=0)
    status: Status
    ended_in: str | None
    message: str | None
    started_at: str
    duration_s: Duration
    metrics: dict[str, float | None]
    reasons: dict[str, str]
    obtained: dict[str, _How]
    processes: list[ProcessReading] = Field(min_length=1)
    remarks: list[str]
    notes: list[str] = []
    broken_limits: list[str]
    unchecked_limits: list[str] = []
    timeline: dict[str, list[float | None]]
    output_tail: str
    machine: _Machine
    settings: dict[str, Any]


def check_version(entry: object) -> dict[str, Any]:
    """Check the schema version of a line, and return the line.

    Raises:
        ResultsError: if the line has no schema version, or one that is not supported.
    """
    if not isinstance(entry, dict) or type(entry.get("schema")) is not int:
        raise ResultsError("no membench record ('schema' is missing)")
    if entry["schema"] > SCHEMA_VERSION:
        raise ResultsError(f"schema {shown(entry['schema'])} is newer than {SCHEMA_VERSION}; a newer membench reads it")
    if entry["schema"] < 1:
        raise ResultsError(f"schema {shown(entry['schema'])}: there is none before 1")
    return entry


def check_header(entry: Mapping[str, Any]) -> None:
    """Check the header of a run, which is its first line.

    Raises:
        ResultsError: if it is invalid: key, value and what is valid.
    """
    _check(_Header, entry)
    _check_name("suite", entry["suite"], checked_name)
    for number, device in enumerate(entry.get("devices", ())):
        _check_name(f"devices.{number}", device, checked_device)


def check_machine(machine: Mapping[str, Any]) -> None:
    """Check the description of a machine.

    Raises:
        ResultsError: if it is invalid: key, value and what is valid.
    """
    _check(_Machine, machine)


def check_record(entry: Mapping[str, Any]) -> list[ProcessReading]:
    """Check a record by itself, and return the readings of its processes.

    Raises:
        ResultsError: if it is invalid: key, value and what is valid.
    """
    if "run" in entry:
        raise ResultsError("a second header: two runs do not go into one file")
    processes = _check(_Record, entry).processes
    for field, value in entry["metrics"].items():
        metric = known_metric(field)  # None: a metric of a later version, whose valid range is not known
        if is_own(field) and metric is None:
            raise ResultsError(
                f"metrics.{shortened(field)}: a plug-in's metric is 'own.NAME.lower' or 'own.NAME.higher', and a unit"
            )
        if value is None:
            continue
        if value < 0 and metric is not None and metric.signed == "no":
            raise ResultsError(f"metrics.{shortened(field)} = {shown(value)}: must be at least 0")
        if not is_possible_value(field, value):
            why = (
                "no machine has so much"
                if metric is not None and metric.unit is BYTES and abs(value) > 1
                else "no figure is of such a size"
            )
            raise ResultsError(f"metrics.{shortened(field)} = {shown(value)}: {why}")
    _check_timeline(entry["timeline"])
    case = entry["case"]
    _check_name("case.device", case["device"], checked_device)
    for part, device in case.get("part_devices", {}).items():
        _check_name("case.part_devices", part, checked_stack)
        _check_name(f"case.part_devices.{part}", device, checked_device)
    if "model_plugin" not in case:  # a test function, whose names are those of its file and test
        for key, name in (("id", entry["id"]), ("case.model", case["model"]), ("case.workload", case["workload"])):
            _check_name(key, name, _checked_text)
        return processes
    for axis, checked in (("model", checked_plugin), ("technique", checked_stack), ("workload", checked_plugin)):
        _check_name(f"case.{axis}", case[axis], checked)
    own = f"{case['model']}/{case['technique']}/{case['workload']}/{case['device']}"
    if entry["id"] != own:
        raise ResultsError(f"id = {shown(entry['id'])}: the case is {own}")
    return processes


def _check_timeline(columns: Mapping[str, Sequence[float | None]]) -> None:
    """Check that each sample of a timeline has its time, and a value or ``null`` in each column.

    Raises:
        ResultsError: if that is not so.
    """
    if not columns:
        return
    if "at_s" not in columns:
        raise ResultsError("'timeline.at_s' is missing")
    if None in columns["at_s"]:
        raise ResultsError(f"timeline.at_s.{columns['at_s'].index(None)} = null: expected a number")
    for name, column in columns.items():
        if len(column) != len(columns["at_s"]):
            raise ResultsError(
                f"timeline.{shortened(name)} has {len(column)} entries and timeline.at_s has {len(columns['at_s'])}:"
                " there must be as many"
            )
        for number, value in enumerate(column):
            if value is not None and abs(value) > LARGEST_SIZE:
                raise ResultsError(f"timeline.{shortened(name)}.{number} = {shown(value)}: no sample is of such a size")


def _check(schema: type[_T], entry: Mapping[str, Any]) -> _T:
    try:
        return schema.model_validate(entry)
    except ValidationError as error:
        raise ResultsError(problem(error, schema, entry).sentence()) from None


def _check_name(key: str, name: str, checked: Callable[[str], str]) -> None:
    """Check a name; it appears in tables and becomes part of file names.

    Raises:
        ResultsError: if it is not valid.
    """
    try:
        checked(name)
    except ValueError as error:
        raise ResultsError(f"{key} = {shown(name)}: {error}") from None


def _checked_text(name: str) -> str:
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_TEXT:
        raise ValueError(f"expected 1 to {_LONGEST_TEXT} printable characters")
    return name


class Membership:
    """A check that records belong to the run with a given header."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._suite = header["suite"]
        self._devices: Sequence[str] = header.get("devices", [])
        self._named = _names(header)
        self._seen: set[tuple[str, int]] = set()

    def check(self, entry: Mapping[str, Any]) -> None:
        """Check the next record.

        Raises:
            ResultsError: if it belongs to another suite or device, or is a duplicate.
        """
        case = entry["case"]
        for axis, named in self._named.items():
            names = members(case[axis]) if axis == "technique" else [case[axis]]
            unknown = next((name for name in names if name not in named), None)
            if unknown is not None:
                raise ResultsError(f"case.{axis} = {shown(case[axis])}: suite '{self._suite}' has no {axis} {unknown}")
        if self._devices and case["device"] not in self._devices:
            raise ResultsError(f"case.device = {shown(case['device'])}: the run is on {' and '.join(self._devices)}")
        if (entry["id"], entry["repeat"]) in self._seen:
            raise ResultsError(f"{entry['id']}, repeat {entry['repeat']}: it is there already")
        self._seen.add((entry["id"], entry["repeat"]))


def _names(header: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the names that a run's suite uses for its cases, by axis; empty if the suite cannot be parsed."""
    try:
        suite = header.get("suite_tables") or tomllib.loads(header.get("suite_text", ""))
        tables = [suite["matrix"], *suite.get("include", [])]
        listed = {
            axis: [name for table in tables for name in _listed(table[axis])]
            for axis in ("model", "technique", "workload")
        }
    except (ValueError, KeyError, TypeError, RecursionError):  # the suite was valid; the file may be damaged
        return {}
    listed["technique"] = [REFERENCE, *(name for stack in listed["technique"] for name in members(stack))]
    return {axis: set(names) for axis, names in listed.items()}


def _listed(value: object) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError
    return names
