"""The tables of a suite, their keys and values checked one by one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from membench.records.names import checked_device, checked_name, checked_plugin, checked_stack

_WEEK_S = 7 * 24 * 3600
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


class ProgramHead(_Table):
    """What any suite says of itself."""

    name: Name
    description: str = ""


class Head(ProgramHead):
    """``plugins``: files of plug-ins, relative to the suite's. ``metrics``: quality metrics that are plug-ins."""

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
    timeout_s: float = Field(600, gt=0, le=_WEEK_S)
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


class Program(_Table):
    """A user's program. Exactly one of ``file``, relative to the suite, and ``module``, as after ``python -m``."""

    file: Annotated[str, Field(min_length=1)] | None = None
    module: Annotated[str, Field(min_length=1)] | None = None
    arguments: list[str] = []
    device: Annotated[str, AfterValidator(checked_device)] = "cpu"

    @model_validator(mode="after")
    def _name_one(self) -> Self:
        if (self.file is None) == (self.module is None):
            raise ValueError("name a file or a module, one of them")
        return self


class ProgramSettings(_Table):
    """How a program is run; a week is as good as for ever."""

    repeats: int = Field(1, ge=1, le=1000)
    timeout_s: float = Field(_WEEK_S, gt=0, le=_WEEK_S)
    sampling_interval_s: float = Field(0.02, ge=0.001, le=10)


class ProgramContents(_Table):
    """A suite that measures a user's program."""

    suite: ProgramHead
    script: Program
    settings: ProgramSettings = ProgramSettings.model_validate({})
    limits: dict[str, Any] = {}
    regression: dict[str, Any] = {}
    gate: dict[str, Any] = {}
