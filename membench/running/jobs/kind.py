"""What the runner asks of a job, of whatever kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from membench.host import environment
from membench.protocol.case import Plugin
from membench.protocol.forking import StartProgram, StartWorker
from membench.protocol.job import Job
from membench.protocol.requests import Rank as RankRequest
from membench.protocol.requests import Steps
from membench.running.deriving import JobReadings
from membench.running.figures import Figures
from membench.running.rank import Rank, Tell
from membench.running.references import References
from membench.suite.schema import Settings


@dataclass(frozen=True, kw_only=True)
class RunnableJob(Job, ABC):
    """A job with what is needed to run it on any machine; a kind of job is one class derived from this.

    Attributes:
        settings: how it is run.
    """

    streams: ClassVar[Sequence[int]] = ()
    """File descriptors of this process that it gets as its standard input and output."""

    settings: Settings

    @property
    @abstractmethod
    def names(self) -> Mapping[str, Any]:
        """What was measured, as its record says it."""

    @property
    def modules(self) -> frozenset[str]:
        """Modules that the fork server imports once, so that no job pays for them."""
        return frozenset()

    @property
    def threads(self) -> int | None:
        """That each rank may compute with; ``None`` leaves that to whatever is measured."""
        return self.settings.threads or max(1, environment.usable_cores() // self.device.count)

    @property
    def steps(self) -> Steps:
        return Steps(self.settings.warmup_steps, self.settings.measured_steps)

    @property
    def preparation(self) -> Plugin | None:
        """The model that does something once before it is measured."""
        return None

    def rank(self, number: int, tell: Tell) -> Rank:
        """One of its processes, before it is started."""
        return Rank(number, self.device.ranks[number], tell)

    def asked(self, number: int) -> RankRequest:
        """Which of its processes a worker is, as the worker hears it."""
        return RankRequest(str(self.device.ranks[number]), self.threads or 1, number, self.device.count)

    @abstractmethod
    def order(self, number: int, references: References) -> StartWorker | StartProgram:
        """What the fork server is to start as rank ``number``."""

    @abstractmethod
    def derive(self, readings: JobReadings) -> Figures:
        """Every metric that has a meaning for it, from what was read of its ranks."""
