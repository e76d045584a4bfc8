"""A suite file (TOML) to a validated suite and its cases."""

from __future__ import annotations

import fnmatch
import itertools
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from membench import registry, units
from membench.errors import PluginError, SuiteError, did_you_mean
from membench.plugins import Setting
from membench.record import METRICS, REFERENCE, Case, Plugin

_BESIDE_PACKAGE = Path(__file__).parent / "suites"
_IN_CHECKOUT = Path(__file__).parent.parent / "suites"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Names = Annotated[list[str], Field(min_length=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[list[str], BeforeValidator(_listed)]


class Head(_Table):
    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""


class Matrix(_Table):
    model: Names
    technique: Names
    workload: Names
    device: Names = ["cpu"]


class Selection(_Table):
    model: Patterns | None = None
    technique: Patterns | None = None
    workload: Patterns | None = None
    device: Patterns | None = None


class Settings(_Table):
    """How cases are run. ``threads`` of None: as many as the cores this process may use."""

    repeats: int = Field(1, ge=1)
    warmup_steps: int = Field(1, ge=1)
    measured_steps: int = Field(5, ge=1)
    seed: int = 0
    threads: int | None = Field(None, ge=1)
    timeout_s: float = Field(600, gt=0, strict=False)
    sampling_interval_s: float = Field(0.02, ge=0.001, le=10, strict=False)
    isolation: Literal["fork", "spawn"] = "fork"


class _File(_Table):
    suite: Head
    matrix: Matrix
    exclude: list[Selection] = []
    include: list[Selection] = []
    model: dict[str, dict[str, Any]] = {}
    technique: dict[str, dict[str, Any]] = {}
    workload: dict[str, dict[str, Any]] = {}
    settings: Settings = Settings.model_validate({})
    limits: dict[str, str | int | float] = {}


@dataclass(frozen=True)
class Suite:
    """A suite, checked: its cases (references included), settings, and limits by metric field."""

    path: Path
    name: str
    description: str
    cases: tuple[Case, ...]
    settings: Settings
    limits: Mapping[str, float]
    text: str

    def select(self, keep: Callable[[str], bool]) -> tuple[Case, ...]:
        """The cases whose id is kept, and the references that their ratios need."""
        kept = [case for case in self.cases if keep(case.id)]
        groups = {case.group for case in kept}
        return tuple(c for c in self.cases if c in kept or (c.technique == REFERENCE and c.group in groups))


def suites() -> dict[str, Path]:
    """Every suite that can be named without path: those in ./suites, then those that come with membench."""
    found: dict[str, Path] = {}
    for folder in (Path.cwd() / "suites", _BESIDE_PACKAGE, _IN_CHECKOUT):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def load_suite(name: str | Path, devices: list[str] | None = None) -> Suite:
    """Read and check a suite.

    Args:
        name: a path, or the name of a suite that comes with membench or lies in ./suites.
        devices: in place of the suite's own devices.

    Raises:
        SuiteError: in one line: file, key, value and what would be right.
    """
    path = Path(name)
    if not path.is_file():
        known = suites()
        if str(name) not in known:
            raise SuiteError(f"no suite '{name}': no such file, and {did_you_mean(str(name), known)}")
        path = known[str(name)]
    try:
        text = path.read_text(encoding="utf-8")
        parsed = tomllib.loads(text)
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not valid TOML: {error}") from None
    try:
        file = _File.model_validate(parsed)
    except ValidationError as error:
        raise SuiteError(f"{path}: {_explain(error)}") from None
    try:
        cases = _expand(file, devices)
        limits = dict(_limit(key, value) for key, value in file.limits.items())
    except (PluginError, SuiteError) as error:
        raise SuiteError(f"{path}: {error}") from None
    return Suite(path, file.suite.name, file.suite.description, cases, file.settings, limits, text)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"'{key}' is missing"
    if first["type"] == "extra_forbidden":
        table: Any = _File
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                annotation = table.model_fields[part].annotation
                table = Selection if part in ("include", "exclude") else annotation
        return f"unknown key '{key}'; {did_you_mean(str(first['loc'][-1]), table.model_fields)}"
    return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _limit(key: str, value: str | int | float) -> tuple[str, float]:
    metric = next((m for m in METRICS if m.name == key), None)
    if metric is None:
        raise SuiteError(f"limits.{key}: no such metric; {did_you_mean(key, (m.name for m in METRICS))}")
    if not metric.field.endswith("_bytes"):
        if isinstance(value, str):
            raise SuiteError(f"limits.{key} = {value!r}: a number is wanted")
        return metric.field, float(value)
    try:
        return metric.field, units.parse_bytes(str(value))
    except ValueError as error:
        raise SuiteError(f"limits.{key}: {error}") from None


def _resolve(kind: str, name: str, variants: Mapping[str, Mapping[str, Any]]) -> Plugin:
    if kind == "technique" and name == REFERENCE and name in variants:
        raise SuiteError(f"technique.{REFERENCE}: every ratio is against it, so it cannot be a variant")
    if name in variants:
        options = dict(variants[name])
        use = options.pop("use", None)
        if not isinstance(use, str):
            raise SuiteError(f"{kind}.{name}.use is missing: name the {kind} that this is a variant of")
    else:
        use, options = name, {}
    try:
        plugin = registry.create(kind, use, options)
    except PluginError as error:
        where = f"{kind}.{name}" if name in variants else f"matrix.{kind}"
        hint = ""
        if variants and name not in variants and str(error).startswith("no "):
            near = did_you_mean(name, variants)
            hint = f" ({near})" if near.startswith("did") and "did you mean" not in str(error) else ""
        raise SuiteError(f"{where}: {error}{hint}") from None
    return Plugin(use, plugin.model_dump(mode="json", exclude_unset=True) | options)


def _case(file: _File, model: str, technique: str, workload: str, device: str) -> Case:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SuiteError(f"matrix.device = '{device}': write cpu, cuda or cuda:0")
    members = technique.split("+")
    if len(members) > 1 and REFERENCE in members:
        raise SuiteError(f"matrix.technique = '{technique}': '{REFERENCE}' has no place in a stack")
    case = Case(
        model,
        technique,
        workload,
        device,
        _resolve("model", model, file.model),
        tuple(_resolve("technique", member, file.technique) for member in members),
        _resolve("workload", workload, file.workload),
    )
    case_model = registry.create("model", case.model_plugin.use, case.model_plugin.options)
    case_workload = registry.create("workload", case.workload_plugin.use, case.workload_plugin.options)
    techniques = tuple(registry.create("technique", plugin.use, plugin.options) for plugin in case.technique_plugins)
    longest, needed = case_model.max_tokens(), case_workload.longest_sequence()
    if longest is not None and needed > longest:
        raise SuiteError(f"workload '{workload}' needs {needed} tokens; model '{model}' takes {longest} at most")
    for position, (name, member) in enumerate(zip(members, techniques, strict=True)):
        setting = Setting(case_model, case_workload, device, techniques[:position], techniques[position + 1 :])
        wrong = member.check(setting)
        if wrong:
            raise SuiteError(f"technique '{name}' on model '{model}' with workload '{workload}': {wrong}")
    return case


def _matches(selection: Selection, case: Case) -> bool:
    return all(
        patterns is None or any(fnmatch.fnmatchcase(getattr(case, key), pattern) for pattern in patterns)
        for key, patterns in selection.model_dump().items()
    )


def _expand(file: _File, devices: list[str] | None) -> tuple[Case, ...]:
    matrix = file.matrix
    devices = devices or matrix.device
    cases: dict[str, Case] = {}

    def add(model: str, technique: str, workload: str, device: str) -> None:
        case = _case(file, model, technique, workload, device)
        cases.setdefault(case.id, case)

    for combination in itertools.product(matrix.model, matrix.technique, matrix.workload, devices):
        add(*combination)
    for number, selection in enumerate(file.exclude):
        gone = [id for id, case in cases.items() if _matches(selection, case)]
        if not gone:
            raise SuiteError(f"exclude.{number} = {selection.model_dump(exclude_none=True)} matches no case")
        for id in gone:
            del cases[id]
    for number, selection in enumerate(file.include):
        for key in ("model", "technique", "workload"):
            if getattr(selection, key) is None:
                raise SuiteError(f"include.{number}.{key} is missing")
        combinations = itertools.product(
            selection.model or [], selection.technique or [], selection.workload or [], selection.device or devices
        )
        for combination in combinations:
            add(*combination)
    if not cases:
        raise SuiteError("no case is left after [[exclude]]")
    for model, workload, device in list(dict.fromkeys(case.group for case in cases.values())):
        add(model, REFERENCE, workload, device)
    groups = list(dict.fromkeys(case.group for case in cases.values()))
    return tuple(sorted(cases.values(), key=lambda case: (groups.index(case.group), case.technique != REFERENCE)))
