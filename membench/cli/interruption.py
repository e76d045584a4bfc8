"""Printing what an interrupted run has measured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from membench.cli import script
from membench.cli.output import print_run
from membench.errors import MembenchError

if TYPE_CHECKING:
    from membench.running.rank import Tell


class TableIfInterrupted:
    """Prints the table of a run if the work in this context is interrupted. Use as a context manager."""

    def __init__(self, form: str, explain: bool = False) -> None:
        self._form, self._explain = form, explain
        self.path: Path | None = None
        """The run's file, once it is open."""

    def hearing(self, tell: Tell) -> Tell:
        """Return a function that learns the run's file from the events that it passes on."""

        def hear(event: str, details: Mapping[str, Any]) -> None:
            if event == "start":
                self.path = Path(details["path"])
            tell(event, details)

        return hear

    def __enter__(self) -> TableIfInterrupted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt) and self.path is not None:
            from membench.records.run_file import read_run

            with contextlib.suppress(MembenchError):  # the interruption matters more than a file that has vanished
                run = read_run(self.path)
                if run.records:
                    script.print_phases(run.records, self._form)
                    print_run(run, self._form, self._explain)
