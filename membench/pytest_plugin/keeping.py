"""Keeps records in runs' files as ``membench run`` does: a file a suite, and one for the functions of test modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import MembenchError
from membench.pytest_plugin.sharing import Sharing, own_name
from membench.regression import baselines
from membench.regression.measured import of_run
from membench.session import run_path
from membench.store import RunFile, read_run, record_of


class Keeper:
    """Writes the files of a pytest run; each record is on the disk before the next test starts."""

    def __init__(self, config: pytest.Config) -> None:
        self._output = Sharing.of(config).output
        self._save_as: str | None = config.getoption("membench_save")
        self._said: list[str] = []
        self._files: dict[Path, RunFile] = {}
        self._counts: dict[Path, int] = {}
        self._open = contextlib.ExitStack()
        config.add_cleanup(self._open.close)

    def keep(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep records. If that cannot be done pytest ends here, with exit code 2 and one line."""
        try:
            for entry in entries:
                path, record = run_path(self._output, entry["header"]), record_of(entry["record"])
                if path not in self._files:
                    header = {**entry["header"], "machine": record.machine}
                    self._files[path] = self._open.enter_context(RunFile.create(path, header))
                self._files[path].append(record)
                self._counts[path] = self._counts.get(path, 0) + 1
        except MembenchError as error:
            pytest.exit(f"membench: {error}", returncode=error.exit_code)

    def finish(self) -> int:
        """Close the files, and save them as baselines if that was asked for; the exit code if it could not be done."""
        self._open.close()
        if self._save_as is None:
            return 0
        try:
            runs = [of_run(read_run(path)) for path in self._files]
            for run in runs:
                name = self._save_as and (own_name(self._save_as, run.suite) if len(runs) > 1 else self._save_as)
                path = baselines.path_of(name or baselines.default_name(run), self._output / baselines.FOLDER.name)
                baselines.write_anew(run, path)
                self._said.append(f"saved as baseline {_shown(path)}")
        except MembenchError as error:
            self._said.append(f"not saved as a baseline: {error}")
            return error.exit_code
        return 0

    def summarize(self, terminal: Any) -> None:
        """Say where the records are."""
        for path, count in self._counts.items():
            terminal.write_line(f"membench: {count} {'record' if count == 1 else 'records'} kept in {_shown(path)}")
        for line in self._said:
            terminal.write_line(f"membench: {line}")


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
