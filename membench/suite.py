"""A suite file (TOML) to a validated suite and its cases."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from membench import plugin_files, suite_names, units
from membench.amounts import amount, wanted
from membench.errors import PluginError, RuleError, SuiteError, did_you_mean, nearest, one_line
from membench.expansion import expand
from membench.names import checked_device, checked_name, checked_plugin, checked_stack, parts
from membench.record import METRICS, REFERENCE, Case, Metric, PluginFile, own_metrics
from membench.regression.gates import Gate
from membench.regression.gates import of_table as gates_of_table
from membench.regression.tolerances import Tolerance
from membench.regression.tolerances import of_table as tolerances_of_table
from membench.validation import problem, shown

_LARGEST_SEED = 2**63 - 1  # TOML's own largest number; torch takes twice as much, techniques add to it


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("text or a list of it is wanted")
    return [value] if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(checked_name)]
Names = Annotated[list[Annotated[str, AfterValidator(checked_plugin)]], Field(min_length=1)]
Stacks = Annotated[list[Annotated[str, AfterValidator(checked_stack)]], Field(min_length=1)]
Devices = Annotated[list[Annotated[str, AfterValidator(checked_device)]], Field(min_length=1)]
Patterns = Annotated[list[str], Field(min_length=1), BeforeValidator(_listed)]
_OneOrMore = BeforeValidator(_listed)


class Head(_Table):
    """``plugins``: files of plug-ins, relative to the suite's. ``metrics``: quality metrics that are plug-ins."""

    name: Name
    description: str = ""
    plugins: Annotated[list[str], _OneOrMore] = []
    metrics: list[Annotated[str, AfterValidator(checked_plugin)]] = []


class Matrix(_Table):
    model: Names
    technique: Stacks
    workload: Names
    device: Devices = ["cpu"]


class Selection(_Table):
    """Patterns of what to leave out; what is not named fits all."""

    model: Patterns | None = None
    technique: Patterns | None = None
    workload: Patterns | None = None
    device: Patterns | None = None

    @model_validator(mode="after")
    def _name_something(self) -> Self:
        if not any(self.axes):
            raise ValueError("it would exclude every case; name a model, technique, workload or device")
        return self

    @property
    def axes(self) -> tuple[list[str] | None, ...]:
        """The patterns in the order in which the id of a case has the names."""
        return (self.model, self.technique, self.workload, self.device)


class Addition(_Table):
    """Names of what to add. ``device`` of ``None``: those of the matrix."""

    model: Annotated[Names, _OneOrMore]
    technique: Annotated[Stacks, _OneOrMore]
    workload: Annotated[Names, _OneOrMore]
    device: Annotated[Devices, _OneOrMore] | None = None


class Settings(_Table):
    """How cases are run. ``threads`` of ``None``: as many as the cores this process may use."""

    repeats: int = Field(1, ge=1, le=1000)
    warmup_steps: int = Field(1, ge=1, le=1_000_000)
    measured_steps: int = Field(5, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, le=_LARGEST_SEED)
    threads: int | None = Field(None, ge=1, le=1024)
    timeout_s: float = Field(600, gt=0, le=7 * 24 * 3600)
    sampling_interval_s: float = Field(0.02, ge=0.001, le=10)
    isolation: Literal["fork", "spawn"] = "fork"


class Contents(_Table):
    """A suite file as it is written, its keys and values checked one by one."""

    suite: Head
    matrix: Matrix
    exclude: list[Selection] = []
    include: list[Addition] = []
    model: dict[str, dict[str, Any]] = {}
    technique: dict[str, dict[str, Any]] = {}
    workload: dict[str, dict[str, Any]] = {}
    metric: dict[str, dict[str, Any]] = {}
    settings: Settings = Settings.model_validate({})
    limits: dict[str, Any] = {}
    regression: dict[str, Any] = {}
    gate: dict[str, Any] = {}


@dataclass(frozen=True)
class Suite:
    """A suite, checked: its cases (references included), settings, limits by metric field, tolerances, gates, and the
    files of its own plug-ins.
    """

    path: Path
    name: str
    description: str
    cases: tuple[Case, ...]
    settings: Settings
    limits: Mapping[str, float]
    text: str
    tolerances: tuple[Tolerance, ...] = ()
    gates: tuple[Gate, ...] = ()
    plugin_files: tuple[PluginFile, ...] = ()

    @property
    def own_metrics(self) -> tuple[Metric, ...]:
        """The metrics that are plug-ins."""
        return own_metrics(field for case in self.cases[:1] for field in case.metric_plugins)

    def select(self, keep: Callable[[str], bool]) -> tuple[Case, ...]:
        """The cases whose id is kept, and what they are compared with: references, and the parts of stacks."""
        wanted = set()
        for case in self.cases:
            if keep(case.id):
                wanted |= {(case.group, t) for t in (case.technique, REFERENCE, *parts(case.technique))}
        return tuple(case for case in self.cases if (case.group, case.technique) in wanted)

    def with_repeats(self, repeats: int) -> Suite:
        """The same suite with as many repeats of each case."""
        return dataclasses.replace(self, settings=self.settings.model_copy(update={"repeats": repeats}))


def is_suite(name: str) -> bool:
    """Whether a name can only mean a suite: it is one's name, or a path."""
    return _is_path(name) or suite_names.find(name) is not None


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith(".toml")


def description(path: Path) -> str:
    """What a suite says of itself, in one line; nothing but the file is looked at.

    Raises:
        SuiteError: if it cannot be read.
    """
    head = _parsed(path, _read(path)).get("suite")
    said = head.get("description", "") if isinstance(head, dict) else ""
    return one_line(str(said).strip().partition("\n")[0])


def load_suite(name: str | Path, devices: list[str] | None = None) -> Suite:
    """Read and check a suite.

    Args:
        name: the name of a suite that comes with membench or lies in ./suites, or a path.
        devices: in place of the suite's own devices.

    Raises:
        SuiteError: in one line: file, key, value and what would be right.
    """
    for device in devices or ():
        try:
            checked_device(device)
        except ValueError as error:
            raise SuiteError(f"--device {shown(device)}: {error}") from None
    path = _found(name)
    text = _read(path)
    parsed = _parsed(path, text)
    try:
        contents = Contents.model_validate(parsed)
    except ValidationError as error:
        raise SuiteError(f"{path}: {problem(error, Contents, parsed).sentence()}") from None
    try:
        files = _plugin_files(contents.suite.plugins, path)
        cases = expand(contents, devices, files)
        own = own_metrics(cases[0].metric_plugins)
        limits = dict(_limit(key, value, own) for key, value in contents.limits.items())
        tolerances, gates = _rules(contents.regression, contents.gate, own)
        if devices is None:  # others may be what a pattern is about
            _refuse_idle_patterns(tolerances, gates, [case.id for case in cases])
    except (SuiteError, RuleError) as error:
        raise SuiteError(f"{path}: {error}") from None
    return Suite(
        path,
        contents.suite.name,
        contents.suite.description,
        cases,
        contents.settings,
        limits,
        text,
        tolerances,
        gates,
        files,
    )


def _plugin_files(names: Sequence[str], path: Path) -> tuple[PluginFile, ...]:
    """A suite's own plug-ins, each file run once to see that it can be."""
    try:
        files = plugin_files.named(names, path.parent)
    except PluginError as error:
        raise SuiteError(f"suite.plugins: {error}") from None
    for file in files:
        try:
            list(plugin_files.classes(file))
        except PluginError as error:
            raise SuiteError(f"plug-in file {error}") from None
    return files


def rules_in(text: str, own: Sequence[Metric] = ()) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    """Tolerances and gates of a suite of which only the text is left, in the header of a run.

    Args:
        own: the suite's metrics that are plug-ins.

    Raises:
        RuleError: if they cannot be understood.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError):
        raise RuleError("the suite's text in the run is not TOML") from None
    regression, gate = tables.get("regression", {}), tables.get("gate", {})
    if not isinstance(regression, dict) or not isinstance(gate, dict):
        raise RuleError("[regression] and [gate] are tables")
    return _rules(regression, gate, own)


def _rules(
    regression: Mapping[str, Any], gate: Mapping[str, Any], own: Sequence[Metric]
) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    return tolerances_of_table(regression, own), gates_of_table(gate, own)


def _refuse_idle_patterns(tolerances: Sequence[Tolerance], gates: Sequence[Gate], case_ids: Sequence[str]) -> None:
    """A pattern that fits no case guards nothing."""
    for table, pattern in (*(("regression", each.match) for each in tolerances), *(("gate", g.match) for g in gates)):
        if not any(fnmatch.fnmatchcase(case_id, pattern) for case_id in case_ids):
            hint = did_you_mean(pattern, case_ids)
            raise SuiteError(f"{table}.case: match = {shown(pattern)} fits no case of the suite; {hint}")


def _found(name: str | Path) -> Path:
    """The file that a suite's name or path means."""
    path, known = Path(name), suite_names.named()
    is_path = _is_path(str(name))
    if not is_path and (found := suite_names.find(str(name))) is not None:
        return found.path()
    try:
        if path.is_file():
            return path
        is_folder, exists = path.is_dir(), path.exists()
        neighbours = {other.stem for other in path.parent.glob("*.toml")} if path.parent.is_dir() else set()
    except OSError as error:  # the name is too long, or the folder is not for this user to see
        raise SuiteError(f"{shown(str(path))}: {error.strerror}") from None
    if not is_path:
        hint = f"did you mean '{path}.toml'?" if path.name in neighbours else did_you_mean(str(name), known)
        raise SuiteError(f"no suite is named {shown(str(name))}; {hint}")
    if is_folder:
        raise SuiteError(f"{path} is a folder; name the .toml file of a suite")
    if exists:
        raise SuiteError(f"{path} is no file that a suite can be read from")
    near = nearest(path.stem, neighbours - {path.stem})
    if os.sep not in str(name) and path.stem in known:
        hint = f"; for the suite of that name write '{path.stem}'"
    else:
        hint = f"; did you mean '{path.with_name(f'{near}.toml')}'?" if near else ""
    raise SuiteError(f"{shown(str(path))}: there is no such file{hint}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SuiteError(
            f"{path}: not UTF-8, as TOML must be: byte 0x{error.object[error.start]:02x} in line {line}"
        ) from None


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SuiteError(f"{path}: not valid TOML: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{path}: not valid TOML: {error}") from None
    except ValueError:  # of Python's own limit
        raise SuiteError(f"{path}: not valid TOML: a number has thousands of digits") from None


def _limit(key: str, value: Any, own: Sequence[Metric]) -> tuple[str, float]:
    known = {metric.name: metric for metric in (*METRICS, *own)}
    metric = known.get(key)
    if metric is None:
        raise SuiteError(f"limits.{key}: no such metric; {did_you_mean(key, known)}")
    try:
        limit = amount(metric, value)
    except (ValueError, OverflowError):
        raise SuiteError(f"limits.{key} = {shown(value)}: write {wanted(metric)}") from None
    if limit < 0 and metric.format is not units.format_difference and metric not in own:
        raise SuiteError(f"limits.{key} = {shown(value)}: a limit must not be negative")
    return metric.field, limit
