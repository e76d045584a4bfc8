"""The interface of executors: opened with the requirements of a run, measures jobs, closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from membench.records.record import Record
from membench.running.jobs.runnable import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell


class Executor(Protocol):
    """Runs jobs and returns their records. Use as a context manager."""

    @property
    def machine(self) -> Mapping[str, Any]:
        """The machine on which the run starts; each record names the machine it was measured on."""

    def measure(self, job: RunnableJob) -> Record:
        """Measure a job and return its record, even if the job fails.

        Raises:
            Interrupted: if a user's program was interrupted; it holds the record.
        """

    def restart(self) -> None:
        """End what was started for previous jobs: the next one starts as the first of a run does."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


Opener = Callable[[Needs, Tell], Executor]
"""Opens an executor for a run; the callback receives the events listed at ``session.run``."""
