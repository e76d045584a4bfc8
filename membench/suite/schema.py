"""The schema of a suite's tables."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from membench.errors import SuiteError
from membench.host.device import MOST_RANKS
from membench.records.names import checked_device, checked_name, checked_plugin, checked_stack
from membench.records.validation import shown

_WEEK_S = 7 * 24 * 3600
_LARGEST_SEED = 2**63 - 1  # the largest integer of TOML; torch accepts twice as much, and techniques add to the seed

_CALM_VARIABLE, _CALM_S, _LONGEST_CALM_S = "MEMBENCH_CALM_WITHIN_S", 5.0, 3600


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("expected text or a list of it")
    return [value] if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(checked_name)]
Names = Annotated[list[Annotated[str, AfterValidator(checked_plugin)]], Field(min_length=1)]
Stacks = Annotated[list[Annotated[str, AfterValidator(checked_stack)]], Field(min_length=1)]
Devices = Annotated[list[Annotated[str, AfterValidator(checked_device)]], Field(min_length=1)]
Patterns = Annotated[list[str], Field(min_length=1), BeforeValidator(_listed)]
_OneOrMore = BeforeValidator(_listed)


class ProgramHead(_Table):
    """The head of any suite."""

    name: Name
    description: str = ""


class Head(ProgramHead):
    """The head of a suite of cases.

    Attributes:
        plugins: plug-in files, relative to the suite's file.
        metrics: the names of custom quality metrics to measure.
    """

    plugins: Annotated[list[str], _OneOrMore] = []
    metrics: list[Annotated[str, AfterValidator(checked_plugin)]] = []


class Matrix(_Table):
    model: Names
    technique: Stacks
    workload: Names
    device: Devices = ["cpu"]


class Selection(_Table):
    """Patterns of cases to exclude; an axis without patterns matches all cases."""

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
        """Return the patterns of each axis, in the order of the names in a case id."""
        return (self.model, self.technique, self.workload, self.device)


class Addition(_Table):
    """Names of cases to add.

    Attributes:
        device: the devices; ``None``: the devices of the matrix.
    """

    model: Annotated[Names, _OneOrMore]
    technique: Annotated[Stacks, _OneOrMore]
    workload: Annotated[Names, _OneOrMore]
    device: Annotated[Devices, _OneOrMore] | None = None


def _calm_within_s() -> float:
    """Return the setting where a suite does not give it: for jobs that share a machine on purpose, one says it once.

    Raises:
        SuiteError: if the environment variable holds no such number of seconds.
    """
    given = os.environ.get(_CALM_VARIABLE, "")
    if not given:
        return _CALM_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_CALM_S:
        raise SuiteError(f"{_CALM_VARIABLE} = {shown(given)}: write seconds from 0 to {_LONGEST_CALM_S}")
    return seconds


class Settings(_Table):
    """Settings for running cases.

    Attributes:
        threads: the number of threads; ``None``: the number of cores that this process may use.
        calm_within_s: how long a case may wait for other processes to leave the cores before its timed steps, and take
            steps again that they disturbed; in all.
        evaluate_s: how long quality may be judged over held-out text in each case, in seconds; 0: it is not judged.
        estimate: whether a case whose size comes near the device's memory is estimated first, and refused if it needs
            more than there is.
    """

    repeats: int = Field(1, ge=1, le=1000)
    warmup_steps: int = Field(1, ge=1, le=1_000_000)
    measured_steps: int = Field(5, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, le=_LARGEST_SEED)
    threads: int | None = Field(None, ge=1, le=1024)
    calm_within_s: float = Field(default_factory=_calm_within_s, ge=0, le=_LONGEST_CALM_S)
    evaluate_s: float = Field(10, ge=0, le=_WEEK_S)
    estimate: bool = True
    timeout_s: float = Field(600, gt=0, le=_WEEK_S)
    sampling_interval_s: float = Field(0.02, ge=0.001, le=10)
    isolation: Literal["fork", "spawn"] = "fork"


class Contents(_Table):
    """The contents of a suite of cases."""

    suite: Head
    matrix: Matrix
    exclude: list[Selection] = []
    include: list[Addition] = []
    model: dict[str, dict[str, Any]] = {}
    technique: dict[str, dict[str, Any]] = {}
    workload: dict[str, dict[str, Any]] = {}
    metric: dict[str, dict[str, Any]] = {}
    settings: Settings = Field(default_factory=lambda: Settings.model_validate({}))
    limits: dict[str, Any] = {}
    regression: dict[str, Any] = {}
    gate: dict[str, Any] = {}


class Program(_Table):
    """A user's program. Exactly one of ``file`` and ``module`` is given.

    Attributes:
        file: the program's file, relative to the suite's.
        module: the program's module, as for ``python -m``.
        ranks: how many processes of it to start, as ``torchrun`` does; ``None``: one, without ``torchrun``'s variables.
    """

    file: Annotated[str, Field(min_length=1)] | None = None
    module: Annotated[str, Field(min_length=1)] | None = None
    arguments: list[str] = []
    device: Annotated[str, AfterValidator(checked_device)] = "cpu"
    ranks: int | None = Field(None, ge=1, le=MOST_RANKS)

    @model_validator(mode="after")
    def _name_one(self) -> Self:
        if (self.file is None) == (self.module is None):
            raise ValueError("name a file or a module, one of them")
        return self


class ProgramSettings(_Table):
    """Settings for running a program. The default timeout, a week, stands for none."""

    repeats: int = Field(1, ge=1, le=1000)
    timeout_s: float = Field(_WEEK_S, gt=0, le=_WEEK_S)
    sampling_interval_s: float = Field(0.02, ge=0.001, le=10)


class ProgramContents(_Table):
    """The contents of a suite that measures a user's program."""

    suite: ProgramHead
    script: Program
    settings: ProgramSettings = ProgramSettings.model_validate({})
    limits: dict[str, Any] = {}
    regression: dict[str, Any] = {}
    gate: dict[str, Any] = {}
