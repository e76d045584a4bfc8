"""Runs jobs one after the other, each in separate processes, and returns a record of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from membench.errors import summary
from membench.host import procfs
from membench.host.device import Device
from membench.host.nvml import gpus
from membench.protocol.messages import BrokenMessage, Result
from membench.protocol.readings import ProcessReading
from membench.records.disturbed_times import WHY, is_disturbed_time
from membench.records.highest_peak import HIGHEST, RUNNING, highest_live_peak
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.fork_client import ForkServer, ForkServerLost
from membench.running.jobs.preparing import PreparingJob
from membench.running.jobs.runnable import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.references import References
from membench.running.running_job import RunningJob, Turn, kernel_killed_for_memory

_PREPARE_TIMEOUT_S = 1800


class Interrupted(KeyboardInterrupt):
    """A program was interrupted; ``record`` holds the measurements up to then."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record


class Runner:
    """Runs jobs on this machine with one fork server. Use as a context manager."""

    def __init__(self, needs: Needs, machine: Mapping[str, Any], tell: Tell, turn: Turn | None = None) -> None:
        """Prepare the runner; no process is started before the first job.

        Args:
            machine: the machine description for records.
            turn: coordinates jobs and timed phases with other runners on this machine.
        """
        self._needs, self._machine, self._tell, self._turn = needs, machine, tell, turn
        self._references = References(needs.references)
        self._server: ForkServer | None = None
        self._gpus, self._no_gpus = gpus() if needs.on_gpu else (None, None)
        self._prepared: dict[str, str | None] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restart()

    def restart(self) -> None:
        """End the fork server; the next job starts a new one, like the first job of a run."""
        if self._server:
            self._server.close()
            self._server = None

    def _ready_server(self) -> ForkServer:
        if self._server is None:
            self._server = ForkServer(self._needs.preload, self._needs.threads, self._needs.variables)
        self._server.wait_until_ready()
        return self._server

    def measure(self, job: RunnableJob) -> Record:
        """Measure a job and return its record, even if the job fails.

        Raises:
            Interrupted: if a user's program was interrupted; it holds the record.
        """
        failure = self._prepare(job)
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        if failure is None:
            finished = self._run(job, job.settings.timeout_s)
        else:
            finished = RunningJob(job, None, self._tell)
            for rank in finished.ranks:
                rank.status, rank.message = "failed", failure
        record = self._record(job, finished, started_at, time.monotonic() - began - finished.waited_s)
        if any(rank.is_interrupted for rank in finished.ranks):
            raise Interrupted(record)
        return record

    def _prepare(self, job: RunnableJob) -> str | None:
        """Prepare a job's model before its first job; return the reason if that failed."""
        model = job.preparation
        if model is None:
            return None
        name = job.names["model"]
        if name not in self._prepared:
            preparing = PreparingJob(
                id=name, repeat=0, device=Device("cpu"), settings=job.settings, model=model
            )  # fmt: skip
            rank = self._run(preparing, _PREPARE_TIMEOUT_S).deciding_rank
            ended_badly = f"preparing the model ended as {rank.status}: {rank.message}"
            self._prepared[name] = None if rank.status == "ok" else ended_badly
        return self._prepared[name]

    def _run(self, job: RunnableJob, timeout_s: float) -> RunningJob:
        """Start the ranks of a job and run them to their end."""
        with RunningJob(job, self._turn, self._tell) as running:
            running.wait_for_turn()
            oom_kills_before = procfs.oom_kills()
            try:
                running.start(self._ready_server(), self._gpus, self._no_gpus, self._references)
                running.run_to_end(timeout_s)
                running.settle_status(timeout_s, oom_kills_before)
            except ForkServerLost as error:
                # The fork server was killed, perhaps by the kernel for lack of memory: the next job starts a new one.
                self.restart()
                for rank in running.ranks:
                    rank.status = "out-of-memory" if kernel_killed_for_memory(oom_kills_before) else "crashed"
                    rank.message = str(error)
        return running

    def _record(self, job: RunnableJob, finished: RunningJob, started_at: str, duration_s: float) -> Record:
        deciding = finished.deciding_rank
        assert deciding.status is not None
        status, message = deciding.status, deciding.message
        processes = tuple(rank.reading() for rank in finished.ranks)
        results = tuple(rank.result for rank in finished.ranks)
        interval_s = job.settings.sampling_interval_s
        try:
            if status == "ok" and any(result is None for result in results):
                raise BrokenMessage("a worker came to its end without its results")
            found = job.derive(JobReadings(status, job.device.on_gpu, interval_s, processes, results))
        except BrokenMessage as error:  # the worker reported its end without its readings
            said = f"; before that: {message}" if message else ""
            found, status, message = DerivedMetrics(), "failed", f"{error}{said}"
        except Exception as error:  # valid messages may have readings that do not go together
            said = f"; before that: {message}" if message else ""
            found, status = DerivedMetrics(), "failed"
            message = f"no figures follow from what a worker read: {summary(error)}{said}"
        if message and len(finished.ranks) > 1:
            message = f"rank {deciding.number}: {message}"
        return Record(
            case=job.names,
            id=job.id,
            repeat=job.repeat,
            status=status,
            ended_in=deciding.phase,
            message=message,
            started_at=started_at,
            duration_s=round(duration_s, 4),
            metrics=found.metrics,
            reasons=found.reasons,
            obtained=found.obtained,
            processes=processes,
            remarks=(
                *_of_all(results, "remarks"),
                *_unchecked_limits(found, status, job.limits, processes),
                *limits_kept_while_running(found, job.limits),
            ),
            notes=_of_all(results, "notes"),
            broken_limits=_broken_limits(found, job.limits, processes),
            unchecked_limits=_skipped_limits(status, job.limits),
            timeline=finished.timeline.columns(),
            output_tail="" if status in ("ok", "skipped") else deciding.tail.decode(errors="replace"),
            machine={**self._machine, "threads": job.threads},
            settings=job.settings.model_dump(),
        )


def _of_all(results: Sequence[Result | None], what: Literal["remarks", "notes"]) -> tuple[str, ...]:
    """Return the remarks or notes of all ranks; what an earlier rank has said is not repeated."""
    found: list[str] = []
    for result in results:
        said: Sequence[str] = getattr(result, what) if result else ()
        found += [line for line in said if line not in found] if found else said
    return tuple(found)


def _unchecked_limits(
    found: DerivedMetrics, status: str, limits: Mapping[str, float], processes: Sequence[ProcessReading]
) -> list[str]:
    """Return remarks on limits that could not be checked: these must not look as if they were kept."""
    if status != "ok":
        return []
    unchecked = {name: found.reasons.get(name, "the case has no such figure") for name in limits
                 if found.metrics.get(name) is None}  # fmt: skip
    unchecked |= {name: WHY for name in limits if name not in unchecked and is_disturbed_time(name, processes)}
    return [f"the limit on {METRIC_OF_FIELD[name].name} was not checked: {why}" for name, why in unchecked.items()]


def _skipped_limits(status: str, limits: Mapping[str, float]) -> tuple[str, ...]:
    """Return a sentence for each limit of a skipped case."""
    if status != "skipped":
        return ()
    return tuple(f"the limit on {METRIC_OF_FIELD[name].name} was not checked: the case was skipped" for name in limits)


def limits_kept_while_running(found: DerivedMetrics, limits: Mapping[str, float]) -> list[str]:
    """Return a remark if the live peak of running is within its limit, and another phase needs more than that."""
    limit, running = limits.get(RUNNING), found.metrics.get(RUNNING)
    peak = highest_live_peak(found.metrics, found.obtained)
    if limit is None or running is None or peak is None or running > limit or peak.at_least_bytes <= limit:
        return []
    metric, of_all = METRIC_OF_FIELD[RUNNING], METRIC_OF_FIELD[HIGHEST]
    return [
        f"{metric.name} is within its limit of {metric.format(limit)} while running, but the case needs {peak};"
        f" a limit on {of_all.name} is one on all phases"
    ]


def _broken_limits(
    found: DerivedMetrics, limits: Mapping[str, float], processes: Sequence[ProcessReading]
) -> tuple[str, ...]:
    broken = []
    for name, limit in limits.items():
        value, metric = found.metrics.get(name), METRIC_OF_FIELD[name]
        if value is None or is_disturbed_time(name, processes):
            continue
        if value > limit if metric.better == "lower" else value < limit:
            direction = "over" if metric.better == "lower" else "under"
            broken.append(f"{metric.name} {metric.format(value)} is {direction} its limit of {metric.format(limit)}")
    return tuple(broken)
