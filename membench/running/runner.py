"""Runs jobs one after the other, each in processes of its own, and turns whatever happens into records."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from membench.host import procfs
from membench.host.device import Device
from membench.host.nvml import gpus
from membench.protocol.messages import BrokenMessage
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.running.deriving import JobReadings
from membench.running.figures import Figures
from membench.running.following import Following, Turn, memory_ran_out
from membench.running.fork_client import ForkServer, ForkServerLost
from membench.running.jobs.kind import RunnableJob
from membench.running.jobs.preparing import PreparingJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.references import References

_PREPARE_TIMEOUT_S = 1800


class Interrupted(KeyboardInterrupt):
    """A program was interrupted; what had been measured of it is in the record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


class Runner:
    """Runs jobs on this machine with one fork server. Use as a context manager."""

    def __init__(self, needs: Needs, machine: Mapping[str, Any], tell: Tell, turn: Turn | None = None) -> None:
        """Make ready; nothing is started before the first job.

        Args:
            machine: the description that records get.
            turn: asked before a job begins and around what is timed, if others measure on this machine.
        """
        self._needs, self._machine, self._tell, self._turn = needs, machine, tell, turn
        self._references = References(needs.references)
        self._server: ForkServer | None = None
        self._gpus, self._no_gpus = gpus() if needs.on_gpu else (None, None)
        self._prepared: dict[str, str | None] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.begin_afresh()

    def begin_afresh(self) -> None:
        """End the fork server: the next job comes out of a new one, as that of another run does."""
        if self._server:
            self._server.close()
            self._server = None

    def _ready_server(self) -> ForkServer:
        if self._server is None:
            self._server = ForkServer(self._needs.preload, self._needs.threads, self._needs.variables)
        self._server.wait_until_ready()
        return self._server

    def measure(self, job: RunnableJob) -> Record:
        """Measure a job; always a record, whatever becomes of its processes.

        Raises:
            Interrupted: if a user's program was, with its record.
        """
        not_ready = self._not_ready(job)
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        if not_ready is None:
            followed = self._followed(job, job.settings.timeout_s)
        else:
            followed = Following(job, None, self._tell)
            for rank in followed.ranks:
                rank.status, rank.message = "failed", not_ready
        record = self._record(job, followed, started_at, time.monotonic() - began - followed.waited_s)
        if any(rank.is_interrupted for rank in followed.ranks):
            raise Interrupted(record)
        return record

    def _not_ready(self, job: RunnableJob) -> str | None:
        """Let a job's model do what it does once, before its first job; the reason if that failed."""
        model = job.preparation
        if model is None:
            return None
        name = job.names["model"]
        if name not in self._prepared:
            preparing = PreparingJob(
                id=name, repeat=0, device=Device("cpu"), settings=job.settings, model=model
            )  # fmt: skip
            rank = self._followed(preparing, _PREPARE_TIMEOUT_S).decisive
            ended_badly = f"preparing the model ended as {rank.status}: {rank.message}"
            self._prepared[name] = None if rank.status == "ok" else ended_badly
        return self._prepared[name]

    def _followed(self, job: RunnableJob, timeout_s: float) -> Following:
        """Start a job's ranks and follow them to their end."""
        with Following(job, self._turn, self._tell) as following:
            following.take_turn()
            oom_kills_before = procfs.oom_kills()
            try:
                following.start(self._ready_server(), self._gpus, self._no_gpus, self._references)
                following.to_the_end(timeout_s)
                following.judge(timeout_s, oom_kills_before)
            except ForkServerLost as error:
                # Something killed the fork server, the kernel for want of memory perhaps: the next gets a new one.
                self.begin_afresh()
                for rank in following.ranks:
                    rank.status = "out-of-memory" if memory_ran_out(oom_kills_before) else "crashed"
                    rank.message = str(error)
        return following

    def _record(self, job: RunnableJob, followed: Following, started_at: str, duration_s: float) -> Record:
        decisive = followed.decisive
        assert decisive.status is not None
        status, message = decisive.status, decisive.message
        processes = tuple(rank.reading() for rank in followed.ranks)
        results = tuple(rank.result for rank in followed.ranks)
        interval_s = job.settings.sampling_interval_s
        try:
            found = job.derive(JobReadings(status, job.device.on_gpu, interval_s, processes, results))
        except BrokenMessage as error:  # it says that it is done, and has not said what it read
            found, status, message = Figures(), "failed", str(error)
        if message and len(followed.ranks) > 1:
            message = f"rank {decisive.number}: {message}"
        first = followed.ranks[0].result
        return Record(
            case=job.names,
            id=job.id,
            repeat=job.repeat,
            status=status,
            ended_in=decisive.phase,
            message=message,
            started_at=started_at,
            duration_s=round(duration_s, 4),
            metrics=found.metrics,
            reasons=found.reasons,
            obtained=found.obtained,
            processes=processes,
            remarks=(*(first.remarks if first else ()), *_unchecked_limits(found, status, job.limits)),
            notes=tuple(first.notes if first else ()),
            broken_limits=_broken_limits(found, job.limits),
            timeline=followed.timeline.columns(),
            output_tail="" if status in ("ok", "skipped") else decisive.tail.decode(errors="replace"),
            machine=self._machine,
            settings=job.settings.model_dump(),
        )


def _unchecked_limits(found: Figures, status: str, limits: Mapping[str, float]) -> list[str]:
    """A limit that nothing was held against must not look kept."""
    if status != "ok":
        return []
    return [
        f"the limit on {METRIC_OF_FIELD[name].name} was not checked: "
        + found.reasons.get(name, "the case has no such figure")
        for name in limits
        if found.metrics.get(name) is None
    ]


def _broken_limits(found: Figures, limits: Mapping[str, float]) -> tuple[str, ...]:
    broken = []
    for name, limit in limits.items():
        value, metric = found.metrics.get(name), METRIC_OF_FIELD[name]
        if value is not None and (value > limit if metric.better == "lower" else value < limit):
            side = "over" if metric.better == "lower" else "under"
            broken.append(f"{metric.name} {metric.format(value)} is {side} its limit of {metric.format(limit)}")
    return tuple(broken)
