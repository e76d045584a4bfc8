"""Storage of records in run files, as for ``membench run``: one per suite, and one for functions of test modules."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import MembenchError, one_line
from membench.pytest_plugin import saving
from membench.pytest_plugin.sharing import Sharing
from membench.records.encoding import record_of
from membench.records.run_file import Run, RunFile, read_run
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
        self.file.append(record_of({**record, "repeat": self.repeats[case_id]}))
        self.repeats[case_id] += 1

    def read(self) -> Run:
        """Read the run, with only the last attempt of each case."""
        run = read_run(self.file.path)
        counting = (record for record in run.records if record.repeat >= self.last.get(record.id, 0))
        return dataclasses.replace(run, records=tuple(counting))


class Keeper:
    """Writes the run files of a pytest run; each record is on disk before the next test starts."""

    def __init__(self, config: pytest.Config) -> None:
        self._output = Sharing.of(config).output
        self._save_as: str | None = config.getoption("membench_save")
        self._messages: list[str] = []
        self._runs: dict[Path, _OpenRun] = {}
        self._open = contextlib.ExitStack()
        config.add_cleanup(self._open.close)

    def keep(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write records. If that fails, pytest exits with code 2 and one line."""
        try:
            for entry in entries:
                if "record" in entry:
                    path = run_path(self._output, entry["header"])
                    if path not in self._runs:
                        header = {**entry["header"], "machine": entry["record"]["machine"]}
                        self._runs[path] = _OpenRun(self._open.enter_context(RunFile.create(path, header)))
                    self._runs[path].append(entry["record"])
        except MembenchError as error:
            pytest.exit(f"membench: {error}", returncode=error.exit_code)

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
        for path, run_file in self._runs.items():
            count = run_file.repeats.total()
            records = "record" if count == 1 else "records"
            terminal.write_line(one_line(f"membench: {count} {records} kept in {saving.shown_path(path)}"))
        for line in self._messages:
            terminal.write_line(one_line(f"membench: {line}"))
