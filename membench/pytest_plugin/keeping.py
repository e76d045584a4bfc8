"""Keeps records in runs' files as ``membench run`` does: a file a suite, and one for the functions of test modules."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import MembenchError
from membench.pytest_plugin import saving
from membench.pytest_plugin.sharing import Sharing
from membench.records.encoding import record_of
from membench.records.run_file import Run, RunFile, read_run
from membench.running.session import run_path


@dataclasses.dataclass
class _Kept:
    """A file under way.

    Attributes:
        repeats: how many there are of each case.
        last: with which repeat of a case its last attempt began: whoever runs failed tests again counts that one.
    """

    file: RunFile
    repeats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    last: dict[str, int] = dataclasses.field(default_factory=dict)

    def append(self, record: dict[str, Any]) -> None:
        case_id = record["id"]
        if record["repeat"] == 0:
            self.last[case_id] = self.repeats[case_id]
        self.file.append(record_of({**record, "repeat": self.repeats[case_id]}))
        self.repeats[case_id] += 1

    def read(self) -> Run:
        """What counts of it."""
        run = read_run(self.file.path)
        counting = (record for record in run.records if record.repeat >= self.last.get(record.id, 0))
        return dataclasses.replace(run, records=tuple(counting))


class Keeper:
    """Writes the files of a pytest run; each record is on the disk before the next test starts."""

    def __init__(self, config: pytest.Config) -> None:
        self._output = Sharing.of(config).output
        self._save_as: str | None = config.getoption("membench_save")
        self._said: list[str] = []
        self._kept: dict[Path, _Kept] = {}
        self._open = contextlib.ExitStack()
        config.add_cleanup(self._open.close)

    def keep(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep records. If that cannot be done pytest ends here, with exit code 2 and one line."""
        try:
            for entry in entries:
                if "record" in entry:
                    path = run_path(self._output, entry["header"])
                    if path not in self._kept:
                        header = {**entry["header"], "machine": entry["record"]["machine"]}
                        self._kept[path] = _Kept(self._open.enter_context(RunFile.create(path, header)))
                    self._kept[path].append(entry["record"])
        except MembenchError as error:
            pytest.exit(f"membench: {error}", returncode=error.exit_code)

    def finish(self) -> int:
        """Close the files, and save them as baselines if that was asked for; the exit code if it could not be done."""
        self._open.close()
        if self._save_as is None:
            return 0
        try:
            self._said += saving.save([kept.read() for kept in self._kept.values()], self._save_as, self._output)
        except MembenchError as error:
            self._said.append(f"not saved as a baseline: {error}")
            return error.exit_code
        return 0

    def summarize(self, terminal: Any) -> None:
        """Say where the records are."""
        for path, kept in self._kept.items():
            count = kept.repeats.total()
            records = "record" if count == 1 else "records"
            terminal.write_line(f"membench: {count} {records} kept in {saving.shown_path(path)}")
        for line in self._said:
            terminal.write_line(f"membench: {line}")
