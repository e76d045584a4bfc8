"""Runs jobs one after the other, each in separate processes, and returns a record of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from membench.errors import SuiteError, summary
from membench.host import procfs
from membench.host.device import Device
from membench.host.nvml import gpus
from membench.protocol.messages import BrokenMessage, Result
from membench.protocol.readings import ProcessReading
from membench.records.disturbed_times import WHY, is_disturbed_time
from membench.records.highest_peak import HIGHEST, RUNNING, highest_live_peak
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import CUT_SHORT, PREPARING, Record, Status
from membench.running import refusing
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.fork_client import ForkServer, ForkServerLost, ForkServerSilent
from membench.running.jobs.case import CaseJob
from membench.running.jobs.preparing import PreparingJob
from membench.running.jobs.runnable import RunnableJob
from membench.running.jobs.verifying import VerifyingJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.references import References
from membench.running.running_job import RunningJob, Turn
from membench.suite.schema import Settings

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
        self._prepared: dict[str, tuple[Status, str] | None] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restart()

    def restart(self, *, answers: bool = True) -> list[str]:
        """End the fork server; the next job starts a new one, like the first job of a run.

        Args:
            answers: whether the fork server may be expected to end by itself.

        Returns:
            names and ids of the processes that cannot be killed.
        """
        server, self._server = self._server, None
        return server.close(answers=answers) if server else []

    def _ready_server(self, timeout_s: float) -> ForkServer:
        if self._server is None:
            self._server = ForkServer(self._needs.preload, self._needs.threads, self._needs.variables)
        self._server.wait_until_ready(timeout_s)
        return self._server

    def refuse_wrong_models(self) -> None:
        """Verify the options of models where only torch can tell, before the first job.

        Raises:
            SuiteError: if those of one are wrong.
        """
        if not self._needs.unverified:
            return
        settings, models = Settings.model_validate({}), self._needs.unverified
        verifying = VerifyingJob(id="models", repeat=0, device=Device("cpu"), settings=settings, models=models)
        for name, problem in self._run(verifying, _PREPARE_TIMEOUT_S).deciding_rank.refused:
            raise SuiteError(f"model '{name}': {problem}")

    def measure(self, job: RunnableJob) -> Record:
        """Measure a job and return its record, even if the job fails.

        Raises:
            Interrupted: if a user's program was interrupted; it holds the record.
        """
        failure = self._prepare(job)
        began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        if failure is None:
            finished = self._run(job, job.settings.timeout_s)
            if isinstance(job, CaseJob) and any(rank.asks_for_estimate for rank in finished.ranks):
                finished = self._refused(job, finished) or self._run(refusing.tried(job), job.settings.timeout_s)
        else:
            finished = RunningJob(job, None, self._tell)
            for rank in finished.ranks:
                rank.status, rank.message = failure
                rank.phase = PREPARING
        record = self._record(job, finished, started_at, time.monotonic() - began - finished.waited_s)
        if any(rank.is_interrupted for rank in finished.ranks):
            raise Interrupted(record)
        return record

    def _prepare(self, job: RunnableJob) -> tuple[Status, str] | None:
        """Prepare a job's model before its first job; return status and reason of its records if that failed."""
        model = job.preparation
        if model is None:
            return None
        name = job.names["model"]
        if name in self._prepared:
            return self._prepared[name]
        preparing = PreparingJob(
            id=name, repeat=0, device=Device("cpu"), settings=job.settings, model=model
        )  # fmt: skip
        finished = self._run(preparing, _PREPARE_TIMEOUT_S)
        rank, failure = finished.deciding_rank, None
        if rank.status != "ok":
            status: Status = rank.status if rank.status in CUT_SHORT else "failed"
            failure = status, f"preparing the model ended as {rank.status}: {rank.message}"
        if not finished.is_lost:  # else it says nothing of the model: another fork server may prepare it
            self._prepared[name] = failure
        return failure

    def _refused(self, job: CaseJob, finished: RunningJob) -> RunningJob | None:
        """Return a case that asked for an estimate, ended for want of memory; ``None`` if it is to be tried.

        One that cannot be estimated, or not in time, is to be tried.
        """
        asked = [rank.asks_for_estimate for rank in finished.ranks if rank.asks_for_estimate]
        estimated = self._run(refusing.estimate_of(job), refusing.ESTIMATE_TIMEOUT_S).deciding_rank
        result = estimated.result if estimated.status == "ok" else None
        reason = refusing.refusal(job, asked, result.estimates or ()) if result else None
        if reason is None:
            return None
        for rank in finished.ranks:
            rank.status, rank.message = "out-of-memory", reason
        return finished

    def _run(self, job: RunnableJob, timeout_s: float) -> RunningJob:
        """Start the ranks of a job and run them to their end."""
        with RunningJob(job, self._turn, self._tell) as running:
            running.wait_for_turn()
            oom_kills_before = procfs.oom_kills()
            try:
                server = self._ready_server(job.settings.timeout_s)
                running.start(server, timeout_s, self._gpus, self._no_gpus, self._references)
                running.run_to_end(timeout_s, oom_kills_before)
                running.settle_status(timeout_s, oom_kills_before)
            except ForkServerLost as error:
                # The next job starts a new fork server.
                unkilled = self.restart(answers=not isinstance(error, ForkServerSilent))
                running.settle_lost(error, unkilled, timeout_s, oom_kills_before)
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
                raise BrokenMessage("a worker ended without reporting its results")
            found = job.derive(JobReadings(status, job.device.on_gpu, interval_s, processes, results))
        except BrokenMessage as error:  # the worker reported its end without its readings
            said = f"; before that: {message}" if message else ""
            found, status, message = DerivedMetrics(), "failed", f"{error}{said}"
        except Exception as error:  # valid messages may have readings that do not go together
            said = f"; before that: {message}" if message else ""
            found, status = DerivedMetrics(), "failed"
            message = f"no figures follow from what a worker read: {summary(error)}{said}"
        if message and len(finished.ranks) > 1 and status != "skipped":
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
            processes=(*processes, *(launched for rank in finished.ranks for launched in rank.launched())),
            remarks=(
                *_of_all(results, "remarks"),
                *found.remarks,
                *(f"{process} cannot be killed, and still runs" for process in finished.unkilled),
                *_limits_left(found, status, job.limits, processes),
                *limits_kept_while_running(found, job.limits),
            ),
            notes=(*_of_all(results, "notes"), *found.notes),
            broken_limits=_broken_limits(found, job.limits, processes),
            unchecked_limits=_unchecked_limits(found, status, job.limits),
            timeline=finished.timeline.columns(),
            output_tail="" if status in ("ok", "skipped") else deciding.output(),
            machine=self._machine,
            settings=job.settings.model_dump(),
        )


def _of_all(results: Sequence[Result | None], what: Literal["remarks", "notes"]) -> tuple[str, ...]:
    """Return the remarks or notes of all ranks; what an earlier rank has said is not repeated."""
    found: list[str] = []
    for result in results:
        said: Sequence[str] = getattr(result, what) if result else ()
        found += [line for line in said if line not in found] if found else said
    return tuple(found)


def _limits_left(
    found: DerivedMetrics, status: str, limits: Mapping[str, float], processes: Sequence[ProcessReading]
) -> list[str]:
    """Return remarks on limits that the case has no figure for, or one that says nothing; they fail nothing."""
    if status != "ok":
        return []
    why = {name: "the case has no such figure" for name in limits if name not in found.metrics}
    why |= {name: WHY for name in limits if name not in why and is_disturbed_time(name, processes)}
    return _not_checked(why)


def _unchecked_limits(found: DerivedMetrics, status: str, limits: Mapping[str, float]) -> tuple[str, ...]:
    """Return a sentence for each limit of a skipped case, or on a figure that is not known: as good as not kept."""
    if status == "skipped":
        return tuple(_not_checked(dict.fromkeys(limits, "the case was skipped")))
    unknown = [name for name in limits if status == "ok" and found.metrics.get(name, 0) is None]
    return tuple(_not_checked({name: found.reasons.get(name, "it is not known") for name in unknown}))


def _not_checked(why: Mapping[str, str]) -> list[str]:
    return [f"the limit on {METRIC_OF_FIELD[name].name} was not checked: {reason}" for name, reason in why.items()]


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
