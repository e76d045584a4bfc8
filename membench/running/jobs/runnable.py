"""The base class of all kinds of jobs, as the runner uses them."""

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
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.rank import Rank, Tell
from membench.running.references import References
from membench.suite.schema import Settings


@dataclass(frozen=True, kw_only=True)
class RunnableJob(Job, ABC):
    """A job with all that an executor needs to run it. Each kind of job is a subclass.

    Attributes:
        settings: the settings of its suite.
    """

    streams: ClassVar[Sequence[int]] = ()
    """File descriptors of this process that the job inherits as its standard input and output."""

    settings: Settings

    @property
    @abstractmethod
    def names(self) -> Mapping[str, Any]:
        """The names of what is measured, for the record."""

    @property
    def modules(self) -> frozenset[str]:
        """Modules that the fork server imports once, which keeps the import time out of every job."""
        return frozenset()

    @property
    def threads(self) -> int | None:
        """Compute threads of each rank; ``None`` leaves the number to the measured program."""
        return self.settings.threads or max(1, environment.usable_cores() // self.device.count)

    @property
    def steps(self) -> Steps:
        """The numbers of warm-up steps and of timed steps."""
        return Steps(self.settings.warmup_steps, self.settings.measured_steps, self.settings.calm_within_s)

    @property
    def unverified(self) -> Mapping[str, Plugin]:
        """The models, by name, whose options torch must verify before anything is measured."""
        return {}

    @property
    def preparation(self) -> Plugin | None:
        """The model to prepare once before the job, if any."""
        return None

    def rank(self, number: int, tell: Tell) -> Rank:
        """Return a rank of the job, not yet started."""
        return Rank(number, self.device.ranks[number], tell)

    def rank_request(self, number: int) -> RankRequest:
        """Return the part of a worker's request that identifies its rank."""
        threads = self.threads or 1
        blas_threads = environment.numpy_threads(threads)
        device = self.device
        return RankRequest(str(device.ranks[number]), threads, number, device.count, blas_threads, device.in_ranks)

    @abstractmethod
    def order(self, number: int, references: References) -> StartWorker | StartProgram:
        """Return the order to the fork server that starts rank ``number``."""

    @abstractmethod
    def derive(self, readings: JobReadings) -> DerivedMetrics:
        """Derive the metrics of the job from the readings of its ranks.

        Raises:
            BrokenMessage: if a rank reached its end without reporting all readings.
        """
