"""What a suite says, in a file of TOML or in Python, to a validated suite and its cases."""

from __future__ import annotations

import contextvars
import copy
import fnmatch
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from membench.errors import PluginError, RuleError, SuiteError, did_you_mean, nearest, one_line
from membench.plugins import local_files
from membench.records.case import REFERENCE, Case, PluginFile
from membench.records.metric import Metric
from membench.records.metrics import METRICS_OF_SCRIPTS, metrics_by_name, own_metrics
from membench.records.names import checked_device, parts
from membench.records.validation import problem, shown
from membench.suite import lookup, python_files
from membench.suite.expansion import cases_of_program, expand
from membench.suite.gates import Gate
from membench.suite.gates import of_table as gates_of_table
from membench.suite.schema import Contents, ProgramContents, Settings
from membench.suite.tolerances import Tolerance
from membench.suite.tolerances import of_table as tolerances_of_table

_FOOTPRINT_OF_PROGRAMS = "5%"
"""How much more a user's program may take before it has regressed, if its suite does not say."""


@dataclass(frozen=True, init=False, eq=False)
class Suite:
    """A suite, checked: its cases (references included), settings, limits by metric field, tolerances, gates, and the
    files of its own plug-ins.

    Attributes:
        path: the file that it is read from; ``None`` of one that is made elsewhere.
        text: as it is written; of one that is made elsewhere, its tables in JSON.
        tables: what it was made of, if that was Python.
    """

    path: Path | None
    name: str
    description: str
    cases: tuple[Case, ...]
    settings: Settings
    limits: Mapping[str, float]
    text: str
    tolerances: tuple[Tolerance, ...]
    gates: tuple[Gate, ...]
    plugin_files: tuple[PluginFile, ...]
    tables: Mapping[str, Any] | None

    def __init__(
        self,
        name: str,
        *,
        matrix: Mapping[str, Any] | None = None,
        script: Mapping[str, Any] | None = None,
        description: str = "",
        plugins: Sequence[str] = (),
        metrics: Sequence[str] = (),
        exclude: Iterable[Mapping[str, Any]] = (),
        include: Iterable[Mapping[str, Any]] = (),
        model: Mapping[str, Any] | None = None,
        technique: Mapping[str, Any] | None = None,
        workload: Mapping[str, Any] | None = None,
        metric: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        regression: Mapping[str, Any] | None = None,
        gate: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a suite in Python. Arguments are the tables of a suite's file, and hold what these hold.

        Args:
            plugins: files of plug-ins, relative to that of the suite, or to the current folder if it is of none.
            metrics: quality metrics that are plug-ins.
            script: of a suite that measures a program, in place of ``matrix``.

        Raises:
            SuiteError: in one line: key, value and what would be right.
        """
        head = {"name": name, "description": description, "plugins": plugins, "metrics": metrics}
        given = {
            "suite": {key: value for key, value in head.items() if value not in ((), [])},
            "matrix": matrix, "script": script, "exclude": list(exclude), "include": list(include),
            "model": model, "technique": technique, "workload": workload, "metric": metric,
            "settings": settings, "limits": limits, "regression": regression, "gate": gate,
        }  # fmt: skip
        path = _BEING_READ.get()
        where = str(path) if path else f"suite {shown(name)}"
        try:
            tables = {key: python_files.plain(value, key) for key, value in given.items() if value not in (None, [])}
        except ValueError as error:
            raise SuiteError(f"{where}: {error}") from None
        self._set(_checked(tables, where, path.parent if path else Path(), None))
        self._set({"path": path, "text": json.dumps(tables, indent=2, ensure_ascii=False), "tables": tables})

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Self:
        suite = cls.__new__(cls)
        suite._set(values)
        return suite

    def _but(self, **values: Any) -> Self:
        changed = copy.copy(self)
        changed._set(values)
        return changed

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

    @property
    def runs_program(self) -> bool:
        """Whether it measures a user's program, which writes to the terminal itself."""
        return any(case.command for case in self.cases)

    def with_repeats(self, repeats: int) -> Suite:
        """The same suite with as many repeats of each case."""
        return self._but(settings=self.settings.model_copy(update={"repeats": repeats}))

    def on(self, devices: list[str]) -> Suite:
        """The same suite on other devices.

        Raises:
            SuiteError: if something in it does not run there.
        """
        tables = self.tables if self.tables is not None else _parsed(Path(str(self.path)), self.text)
        folder = self.path.parent if self.path else Path()
        return self._but(**_checked(tables, str(self.path or f"suite '{self.name}'"), folder, devices))


_BEING_READ: contextvars.ContextVar[Path | None] = contextvars.ContextVar("being read", default=None)
"""The file whose suites are being made."""


def is_suite(name: str) -> bool:
    """Whether a name can only mean a suite: it is one's name, or a path."""
    return _is_path(name) or lookup.find(name) is not None


def _is_path(name: str) -> bool:
    return os.sep in name or name.partition("::")[0].endswith((".toml", ".py"))


def description(path: Path) -> str:
    """What a suite says of itself, in one line. Of one in TOML nothing but the file is looked at; Python is run.

    Raises:
        SuiteError: if it cannot be read.
    """
    file, _, chosen = str(path).partition("::")
    if file.endswith(".py"):
        own = None if chosen else python_files.docstring(Path(file))
        return one_line((own or load_suite(path).description).strip().partition("\n")[0])
    head = _parsed(path, _read(path)).get("suite")
    said = head.get("description", "") if isinstance(head, dict) else ""
    return one_line(str(said).strip().partition("\n")[0])


def load_suite(name: str | Path, devices: list[str] | None = None) -> Suite:
    """Read and check a suite.

    Args:
        name: the name of a suite that comes with membench or lies in ./suites, or a path; of a file in Python that
            makes several, with the name of one: ``suites.py::small``.
        devices: in place of the suite's own devices.

    Raises:
        SuiteError: in one line: file, key, value and what would be right.
    """
    for device in devices or ():
        try:
            checked_device(device)
        except ValueError as error:
            raise SuiteError(f"--device {shown(device)}: {error}") from None
    file, _, chosen = str(name).partition("::")
    path = _found(file if chosen else name)
    if path.suffix == ".py":
        suite = _chosen(suites_in(path), path, chosen)
        return suite if devices is None else suite.on(devices)
    if chosen:
        raise SuiteError(f"{shown(str(name))}: only a file in Python makes several suites")
    text = _read(path)
    values = _checked(_parsed(path, text), str(path), path.parent, devices)
    return Suite._of({**values, "path": path, "text": text, "tables": None})


def suites_in(path: Path) -> list[Suite]:
    """The suites that a file in Python makes: its variables, and what lists, tuples and dicts among them hold.

    Raises:
        SuiteError: if it ends in an error, makes none, or two of one name: file, line and what is wrong.
    """
    token = _BEING_READ.set(path)
    try:
        namespace, text = python_files.executed(path)
    finally:
        _BEING_READ.reset(token)
    found: dict[str, Suite] = {}
    for suite in python_files.held(namespace.values(), Suite):
        other = found.setdefault(suite.name, suite)
        if other is not suite:
            raise SuiteError(f"{path}: two suites are named '{suite.name}'")
    if not found:
        raise SuiteError(f"{path} makes no suite: assign a membench.Suite(...) to a variable")
    return [suite._but(path=path, text=text) for suite in found.values()]


def _chosen(suites: Sequence[Suite], path: Path, name: str) -> Suite:
    if not name:
        if len(suites) > 1:
            several = ", ".join(f"{path}::{suite.name}" for suite in suites)
            raise SuiteError(f"{path} makes {len(suites)} suites; name one: {several}")
        return suites[0]
    named = next((suite for suite in suites if suite.name == name), None)
    if named is None:
        raise SuiteError(f"{path} makes no suite {shown(name)}; {did_you_mean(name, (s.name for s in suites))}")
    return named


def _checked(tables: Mapping[str, Any], where: str, folder: Path, devices: Sequence[str] | None) -> dict[str, Any]:
    """What a suite's tables come to, by the names of a ``Suite``'s attributes.

    Args:
        where: what errors begin with.
        folder: that a program's file is relative to.
        devices: in place of the suite's own.

    Raises:
        SuiteError: in one line: key, value and what would be right.
    """
    if {"script", "matrix"} <= tables.keys():
        raise SuiteError(f"{where}: 'script' and 'matrix' do not go together: a suite is of cases, or of a program")
    schema: type[Contents | ProgramContents] = ProgramContents if "script" in tables else Contents
    try:
        contents = schema.model_validate(tables)
    except ValidationError as error:
        raise SuiteError(f"{where}: {problem(error, schema, tables).sentence()}") from None
    try:
        files: tuple[PluginFile, ...] = ()
        if isinstance(contents, Contents):
            files = _plugin_files(contents.suite.plugins, folder)
            cases, settings = expand(contents, devices, files), contents.settings
        else:
            cases = cases_of_program(contents.script, folder, devices)
            settings = Settings.model_validate(contents.settings.model_dump())
        own = own_metrics(cases[0].metric_plugins)
        limits = dict(_limit(key, value, own) for key, value in contents.limits.items())
        tolerances, gates = _rules(contents.regression, contents.gate, own, of_program=schema is ProgramContents)
        if isinstance(contents, ProgramContents):
            _refuse_unknown_of_programs(contents.limits, tolerances, gates)
        if devices is None:  # others may be what a pattern is about
            _refuse_idle_patterns(tolerances, gates, [case.id for case in cases])
    except (SuiteError, RuleError) as error:
        raise SuiteError(f"{where}: {error}") from None
    return {
        "name": contents.suite.name,
        "description": contents.suite.description,
        "cases": cases,
        "settings": settings,
        "limits": limits,
        "tolerances": tolerances,
        "gates": gates,
        "plugin_files": files,
    }


def _plugin_files(names: Sequence[str], folder: Path) -> tuple[PluginFile, ...]:
    """A suite's own plug-ins, each file run once to see that it can be."""
    try:
        files = local_files.named(names, folder)
    except PluginError as error:
        raise SuiteError(f"suite.plugins: {error}") from None
    for file in files:
        try:
            found = list(local_files.classes(file))
        except PluginError as error:
            raise SuiteError(f"plug-in file {error}") from None
        if not found and file.name in names:
            raise SuiteError(
                f"suite.plugins: '{file.name}' has no plug-in: one is a class that is defined there, derived from one"
                " of membench.plugins, and has a name that begins with no underscore"
            )
    return files


def rules_of(header: Mapping[str, Any], own: Sequence[Metric] = ()) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    """Tolerances and gates of a suite of which only what the header of a run keeps is left.

    Args:
        own: the suite's metrics that are plug-ins.

    Raises:
        RuleError: if they cannot be understood.
    """
    tables = header.get("suite_tables")
    if tables is None:
        try:
            tables = tomllib.loads(str(header.get("suite_text", "")))
        except (ValueError, RecursionError):
            raise RuleError("the suite's text in the run is not TOML") from None
    regression, gate = tables.get("regression", {}), tables.get("gate", {})
    if not isinstance(regression, dict) or not isinstance(gate, dict):
        raise RuleError("[regression] and [gate] are tables")
    return _rules(regression, gate, own, of_program="script" in tables)


def _refuse_unknown_of_programs(
    limits: Mapping[str, Any], tolerances: Sequence[Tolerance], gates: Sequence[Gate]
) -> None:
    """What is about a figure that no program has would look kept for ever."""
    named = [(f"limits.{name}", name) for name in limits]
    named += [(f"regression.{each.metric.name}", each.metric.name) for each in tolerances if each.origin == "suite"]
    named += [(f"gate: rule {shown(gate.text)}", name) for gate in gates for name in sorted(gate.metrics)]
    known = [metric.name for metric in METRICS_OF_SCRIPTS]
    for where, name in named:
        if name not in known:
            raise SuiteError(f"{where}: of a script {name} is not known; known: {', '.join(known)}")
    for gate in gates:
        if gate.uses_reference:
            raise SuiteError(f"gate: rule {shown(gate.text)}: a script has no reference; hold it against an amount")


def _rules(
    regression: Mapping[str, Any], gate: Mapping[str, Any], own: Sequence[Metric], *, of_program: bool
) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    if of_program:  # of which nothing that is watched by default is known but the time
        regression = {"peak_footprint": _FOOTPRINT_OF_PROGRAMS, **regression}
    return tolerances_of_table(regression, own), gates_of_table(gate, own)


def _refuse_idle_patterns(tolerances: Sequence[Tolerance], gates: Sequence[Gate], case_ids: Sequence[str]) -> None:
    """A pattern that fits no case guards nothing."""
    for table, pattern in (*(("regression", each.match) for each in tolerances), *(("gate", g.match) for g in gates)):
        if not any(fnmatch.fnmatchcase(case_id, pattern) for case_id in case_ids):
            hint = did_you_mean(pattern, case_ids)
            raise SuiteError(f"{table}.case: match = {shown(pattern)} fits no case of the suite; {hint}")


def _found(name: str | Path) -> Path:
    """The file that a suite's name or path means."""
    path, known = Path(name), lookup.named()
    is_path = _is_path(str(name))
    if not is_path and (found := lookup.find(str(name))) is not None:
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
    known = metrics_by_name(own)
    metric = known.get(key)
    if metric is None:
        raise SuiteError(f"limits.{key}: no such metric; {did_you_mean(key, known)}")
    try:
        limit = metric.unit.amount(value)
    except (ValueError, OverflowError):
        raise SuiteError(f"limits.{key} = {shown(value)}: write {metric.unit.expected}") from None
    if limit < 0 and metric.signed != "yes":
        raise SuiteError(f"limits.{key} = {shown(value)}: a limit must not be negative")
    return metric.field, limit
