"""What a session asks of whatever runs its jobs: opened with what a run needs, a record for each job, closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

from membench.records.record import Record
from membench.running.jobs.kind import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell


class Executor(Protocol):
    """Where jobs run. Use as a context manager."""

    @property
    def machine(self) -> Mapping[str, Any]:
        """The machine that a run is begun on; each record says on which it was measured."""

    def measure(self, job: RunnableJob) -> Record:
        """Measure a job; always a record, whatever becomes of it.

        Raises:
            Interrupted: if a user's program was interrupted, with its record.
        """

    def begin_afresh(self) -> None:
        """Measure what comes as another run would, with nothing left of what was before."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


Opener = Callable[[Needs, Tell], Executor]
"""Opens an executor for a run; what happens is told as ``session.run`` says."""
