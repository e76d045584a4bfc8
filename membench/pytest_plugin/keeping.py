"""Keeps records in runs' files as ``membench run`` does: a file a suite, and one for the functions of test modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import MembenchError
from membench.pytest_plugin.sharing import Sharing
from membench.session import run_path
from membench.store import RunFile, record_of


class Keeper:
    """Writes the files of a pytest run; each record is on the disk before the next test starts."""

    def __init__(self, config: pytest.Config) -> None:
        self._output = Sharing.of(config).output
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

    def summarize(self, terminal: Any) -> None:
        """Say where the records are."""
        for path, count in self._counts.items():
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            terminal.write_line(f"membench: {count} {'record' if count == 1 else 'records'} kept in {shown}")
