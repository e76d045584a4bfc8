"""Storage of records in run files, as for ``membench run``: one per suite, and one for functions of test modules."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import MembenchError, ResultsError, one_line
from membench.pytest_plugin import saving
from membench.pytest_plugin.outcome import MembenchWarning
from membench.pytest_plugin.sharing import Sharing
from membench.records.encoding import record_of
from membench.records.run_file import KeptElsewhere, Run, RunFile, read_run
from membench.running.session import run_path


@dataclasses.dataclass
class _OpenRun:
    """An open run file.

    Attributes:
        repeats: the number of repeats of each case.
        last: the first repeat of the last attempt of each case: only the last attempt counts if a plug-in reruns tests.
    """

    file: RunFile
    repeats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    last: dict[str, int] = dataclasses.field(default_factory=dict)

    def append(self, record: dict[str, Any]) -> None:
        """Append a record as the next repeat of its case."""
        case_id = record["id"]
        if record["repeat"] == 0:
            self.last[case_id] = self.repeats[case_id]
        repeat = self.repeats[case_id]
        try:
            self.file.append(record_of({**record, "repeat": repeat}))
        except KeptElsewhere:
            self.repeats[case_id] += 1
            raise
        self.repeats[case_id] += 1

    def read(self) -> Run:
        """Read the run, with only the last attempt of each case."""
        run = read_run(self.file.path)
        counting = (record for record in run.records if record.repeat >= self.last.get(record.id, 0))
        return dataclasses.replace(run, records=tuple(counting))


class Keeper:
    """Writes the run files of a pytest run; each record is on disk before the next test starts.

    If the folder for results cannot be written, records are kept in a temporary folder, or not at all, with one
    warning: tests measure and judge nevertheless.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._output = self._folder = Sharing.of(config).output
        self._keeps = True
        self._save_as: str | None = config.getoption("membench_save")
        self._messages: list[str] = []
        self._runs: dict[Path, _OpenRun] = {}
        self._open = contextlib.ExitStack()
        config.add_cleanup(self._open.close)

    def keep(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write records."""
        for entry in entries:
            if "record" in entry and self._keeps:
                try:
                    self._append(entry)
                except KeptElsewhere as error:
                    self._go_on_in(error, run_path(self._output, entry["header"]))
                except ResultsError as error:
                    if run_path(self._output, entry["header"]) in self._runs:
                        self._warn(str(error))  # it is the record that cannot be kept, not the file
                    else:
                        self._keep_elsewhere(error, entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        path = run_path(self._output, entry["header"])
        if path not in self._runs:
            header = {**entry["header"], "machine": entry["record"]["machine"]}
            self._runs[path] = _OpenRun(self._opened(RunFile.create(self._folder / path.name, header)))
        self._runs[path].append(entry["record"])

    def _opened(self, file: RunFile) -> RunFile:
        return self._open.enter_context(file)

    def _go_on_in(self, error: KeptElsewhere, path: Path) -> None:
        """Continue a run's file where its records are now."""
        self._keeps = error.path is not None
        if error.path is not None:
            self._folder = error.path.parent
            run = self._runs[path]
            continued = run.file.continued_at(error.path)
            if continued is not run.file:
                run.file = self._opened(continued)
        self._warn(str(error))

    def _keep_elsewhere(self, error: ResultsError, entry: Mapping[str, Any]) -> None:
        """Keep a record, and those that follow, in a temporary folder."""
        try:
            if self._folder != self._output:
                raise error
            self._folder = Path(tempfile.mkdtemp(prefix="membench-kept-"))
            self._append(entry)
        except (OSError, ResultsError):
            self._keeps = False
        self._warn(f"{error}; records are kept {f'in {self._folder}' if self._keeps else 'nowhere'}")

    def _warn(self, text: str) -> None:
        try:
            self._config.issue_config_time_warning(MembenchWarning(one_line(f"membench: {text}")), stacklevel=2)
        except MembenchWarning:  # warnings are errors in this run, but this one is of no test
            self._messages.append(text)

    def finish(self) -> int:
        """Close the files, and save baselines if requested; return 0, or the exit code if saving failed."""
        self._open.close()
        if self._save_as is None:
            return 0
        try:
            self._messages += saving.save([each.read() for each in self._runs.values()], self._save_as, self._output)
        except MembenchError as error:
            self._messages.append(f"not saved as a baseline: {error}")
            return error.exit_code
        return 0

    def summarize(self, terminal: Any) -> None:
        """Print where records and baselines were written."""
        for run_file in self._runs.values():
            count = run_file.repeats.total()
            records = "record" if count == 1 else "records"
            where = saving.shown_path(run_file.file.path)
            terminal.write_line(one_line(f"membench: {count} {records} kept in {where}"))
        for line in self._messages:
            terminal.write_line(one_line(f"membench: {line}"))
