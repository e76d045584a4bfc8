"""A checked suite: its cases, settings, limits and rules."""

from __future__ import annotations

import contextvars
import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from membench.errors import SuiteError
from membench.protocol.case import Case, PluginFile
from membench.records.metric import Metric
from membench.records.metrics import own_metrics
from membench.records.validation import shown
from membench.suite import python_files, toml_files
from membench.suite.checking import checked
from membench.suite.gates import Gate
from membench.suite.schema import Settings
from membench.suite.tolerances import Tolerance

FILE_BEING_READ: contextvars.ContextVar[Path | None] = contextvars.ContextVar("file being read", default=None)
"""The Python file that is being run to load its suites; ``None`` outside of that."""


@dataclass(frozen=True, init=False, eq=False)
class Suite:
    """A checked suite: its cases, settings, limits and rules.

    Attributes:
        path: the file that it was read from; ``None`` if it was not read from a file.
        cases: the cases, references included.
        limits: the worst value that each limited metric may have, by metric field.
        text: the text of its file; for a suite made in Python, its tables in JSON.
        plugin_files: the files of its own plug-ins.
        tables: the tables that it was made from; ``None`` if it was read from TOML.
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
        """Make a suite in Python. The arguments are the tables of a suite file, with the same keys and values.

        Args:
            plugins: plug-in files, relative to the suite's file, or to the current folder if it has none.
            metrics: the names of custom quality metrics to measure.
            script: the program to measure, instead of ``matrix``.

        Raises:
            SuiteError: if the suite is invalid; in one line: key, value and what is valid.
        """
        head = {"name": name, "description": description, "plugins": plugins, "metrics": metrics}
        given = {
            "suite": {key: value for key, value in head.items() if value not in ((), [])},
            "matrix": matrix, "script": script, "exclude": list(exclude), "include": list(include),
            "model": model, "technique": technique, "workload": workload, "metric": metric,
            "settings": settings, "limits": limits, "regression": regression, "gate": gate,
        }  # fmt: skip
        path = FILE_BEING_READ.get()
        where = str(path) if path else f"suite {shown(name)}"
        try:
            tables = {key: python_files.as_toml(value, key) for key, value in given.items() if value not in (None, [])}
        except ValueError as error:
            raise SuiteError(f"{where}: {error}") from None
        self._set(checked(tables, where, path.parent if path else Path(), None))
        self._set({"path": path, "text": json.dumps(tables, indent=2, ensure_ascii=False), "tables": tables})

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> Self:
        suite = cls.__new__(cls)
        suite._set(values)
        return suite

    def _with(self, **values: Any) -> Self:
        changed = copy.copy(self)
        changed._set(values)
        return changed

    @property
    def own_metrics(self) -> tuple[Metric, ...]:
        """Return the suite's custom metrics."""
        return own_metrics(field for case in self.cases[:1] for field in case.metric_plugins)

    def select(self, keep: Callable[[str], bool]) -> tuple[Case, ...]:
        """Return the cases whose ids match, and those they are compared with: references and parts of stacks.

        Args:
            keep: a predicate of case ids.
        """
        wanted = set()
        for case in self.cases:
            if keep(case.id):
                wanted |= {(case.group, case.technique), *case.compared_with}
        return tuple(case for case in self.cases if (case.group, case.technique) in wanted)

    @property
    def runs_program(self) -> bool:
        """Whether the suite measures a user's program, which may write to the terminal."""
        return any(case.command for case in self.cases)

    @property
    def code_folder(self) -> Path:
        """Return the folder of the code under test: of the suite's file, else of its program, else the current one."""
        program = next((case.command[:2] for case in self.cases if case.command), ())
        files = [Path(word) for word in program if word != sys.executable and Path(word).is_file()]
        file = self.path or next(iter(files), None)
        return file.resolve().parent if file else Path.cwd()

    def with_repeats(self, repeats: int) -> Suite:
        """Return the same suite with another number of repeats of each case."""
        return self._with(settings=self.settings.model_copy(update={"repeats": repeats}))

    def without_held_out_text(self) -> Suite:
        """Return the same suite, of whose cases quality is not judged over held-out text."""
        return self._with(settings=self.settings.model_copy(update={"evaluate_s": 0.0}))

    def without_estimates(self) -> Suite:
        """Return the same suite, of whose cases none is refused for what it is estimated to need."""
        return self._with(settings=self.settings.model_copy(update={"estimate": False}))

    def on(self, devices: list[str]) -> Suite:
        """Return the same suite on other devices.

        Raises:
            SuiteError: if one of its cases cannot run there.
        """
        tables = self.tables if self.tables is not None else toml_files.parsed(Path(str(self.path)), self.text)
        folder = self.path.parent if self.path else Path()
        return self._with(**checked(tables, str(self.path or f"suite '{self.name}'"), folder, devices))
