"""Runs of a suite: measuring its cases and writing their records to a file."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from membench.errors import ResultsError
from membench.host import environment
from membench.host.code_version import CodeVersion, code_version
from membench.plugins import local_files
from membench.protocol.case import REFERENCE, Case, PluginFile
from membench.protocol.requests import Checkouts
from membench.records.metric import Metric
from membench.records.record import Record
from membench.records.run_file import Run, RunFile, find_run, read_run
from membench.running.executors.executor import Opener
from membench.running.executors.local import LocalExecutor, machine_here
from membench.running.jobs.from_case import JobMaker, job_from_case
from membench.running.jobs.runnable import RunnableJob
from membench.running.losses import KnownLosses
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.references import References, references, remove
from membench.running.runner import Interrupted
from membench.suite.sharding import Shard, share
from membench.suite.suite import Suite


def silent(event: str, details: Mapping[str, Any]) -> None:
    """Ignore the events of a run."""
    del event, details


def run(
    suite: Suite,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    resume: bool | Path = False,
    tell: Tell = silent,
    executor: Opener = LocalExecutor,
    keeps_references: bool = False,
    job_of: JobMaker = job_from_case,
    shard: Shard | None = None,
) -> Run:
    """Run a suite's cases and keep a record of each.

    Args:
        suite: a suite as returned by ``load_suite``.
        keep: returns whether to run the case with an id; required references are always run.
        output: the folder for the run's file.
        resume: continue a run: the newest of this suite in ``output``, or the run in the given file.
        tell: called with the name and the details of each event. It runs between two samples of the measured process
            and should return quickly:

            ========  ==========================================================================================
            start     ``path`` of the run's file, ``of``: the number of cases, ``done``: how many are measured already
            case      ``id``, ``number`` (from 1), ``of``: a case begins
            progress  ``what``, ``done``, ``total``: a model is prepared once before its first case
            baseline  ``bytes`` resident in the worker before the case; its memory figures exclude them
            phase     ``phase``: a phase begins
            memory    ``bytes`` resident in the worker and its children now, the baseline included
            record    ``id``, ``status``, ``duration_s``, ``over_limit``: a case has ended and its record is on disk
            ========  ==========================================================================================

        executor: opens the executor that runs the cases; by default, this machine.
        keeps_references: keep the logits of references beside the run's file, because ``measure_again`` may need them.
        job_of: makes the job of a case; by default, the one that measures it.
        shard: measure only this share of the cases.

    Raises:
        ResultsError: if there is no run to resume; if the suite, its devices or the machine have changed since; or if
            the run's file cannot be written. Records written before are kept.
    """
    cases = suite.select(keep)
    if shard is not None:
        cases = share(cases, shard)
    with Session(
        suite, cases, Path(output), resume=resume, tell=tell, executor=executor, keeps_references=keeps_references,
        job_of=job_of, shard=shard,
    ) as session:  # fmt: skip
        records = read_run(session.path).records
        done = {(record.id, record.repeat) for record in records}
        asked = [(case, repeat) for repeat in range(suite.settings.repeats) for case in cases]
        todo = [(case, repeat) for case, repeat in asked if (case.id, repeat) not in done]
        again = _references_to_repeat(suite, session.path, [case for case, _ in todo], records)
        session.measure_all([*again, *todo], done=len(asked) - len(todo))
    return read_run(session.path)


def _references_to_repeat(
    suite: Suite, path: Path, todo: Sequence[Case], records: Sequence[Record]
) -> list[tuple[Case, int]]:
    """Return the references to measure once more, each with the number of its repeat.

    They are those that cases are to be compared with and whose logits were removed when a run was done with them.
    """
    kept, measured = References(references(path)), collections.Counter(record.id for record in records)
    with_logits = {
        record.id for record in records for process in record.processes if process.quality and process.quality.nats
    }
    groups = {case.reference_group for case in todo} - {case.group for case in todo if case.technique == REFERENCE}
    return [
        (case, measured[case.id])
        for case in suite.cases
        if case.technique == REFERENCE and case.group in groups and case.id in with_logits and not kept.has(case)
    ]


class Session:
    """An open run with its file and its executor. Use as a context manager."""

    def __init__(
        self,
        suite: Suite,
        cases: tuple[Case, ...],
        output: Path,
        *,
        resume: bool | Path = False,
        tell: Tell = silent,
        executor: Opener = LocalExecutor,
        code: CodeVersion | None = None,
        checkouts: Checkouts | None = None,
        keeps_references: bool = False,
        job_of: JobMaker = job_from_case,
        shard: Shard | None = None,
    ) -> None:
        """Open the run's file and its executor; see ``run`` for the other arguments.

        Args:
            cases: all cases that may be measured.
            code: the commit of the code under test, for the header of a new run; ``None``: that of the suite's file.
            checkouts: the checkout to measure, and the one whose code must not be imported.
            keeps_references: keep the logits of references after all, too; else only if the run is interrupted.

        Raises:
            ResultsError: as for ``run``.
        """
        self._suite, self._tell, self._checkouts = suite, tell, checkouts
        self._keeps_references, self._job_of = keeps_references, job_of
        self._losses = KnownLosses()
        resumed = _run_to_resume(suite, output, resume, shard)
        code = code or code_version(suite.code_folder)
        header = header_of(suite, datetime.now(UTC), code) | ({"shard": str(shard)} if shard else {})
        self.path = resumed or run_path(output, header)
        jobs = [self._job(case, 0) for case in cases]
        described = [self._job(case, 0) for case in suite.cases]
        self._executor = executor(Needs.of(jobs, references(self.path), described=described), tell)
        try:
            machine = self._executor.machine
            if resumed:
                _check_resumable(resumed, suite, machine, code if resume is True else None)
                self._file = RunFile.reopen(resumed)
                self._losses = KnownLosses(read_run(resumed).records)
            else:
                self._file = RunFile.create(self.path, {**header, "machine": machine})
        except BaseException:
            self._executor.__exit__(None, None, None)
            raise

    def __enter__(self) -> Session:
        self._file.__enter__()
        self._executor.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._executor.__exit__(kind, error, at)
            if error is None or isinstance(error, KeyboardInterrupt):
                self._file.check()
        finally:
            self._file.__exit__(kind, error, at)
        if error is None and not self._keeps_references:
            remove(self.path)

    def _job(self, case: Case, repeat: int) -> RunnableJob:
        return self._job_of(case, repeat, self._suite.settings, self._suite.limits, self._checkouts, self._losses)

    def measure_all(self, todo: Sequence[tuple[Case, int]], *, done: int = 0, afresh: bool = False) -> None:
        """Measure cases in order, each with the number of its repeat.

        Args:
            done: how many were measured before, if this goes on with a run; events count them.
            afresh: whether the executor is restarted before each repeat, as for a separate run.
        """
        of = done + len(todo)
        self._tell("start", {"path": str(self.path), "of": of, "done": done})
        begun: int | None = None
        for number, (case, repeat) in enumerate(todo, done + 1):
            if afresh and repeat != begun:
                begun = repeat
                self._executor.restart()
            self._tell("case", {"id": case.id, "number": number, "of": of})
            self.measure(case, repeat)

    def measure(self, case: Case, repeat: int) -> Record:
        """Measure a case, write its record and return it as it was written.

        Raises:
            Interrupted: if a user's program was interrupted; its record is written.
            ResultsError: if the record cannot be written; it says where what was measured is kept.
        """
        try:
            record = self._executor.measure(self._job(case, repeat))
        except Interrupted as interrupted:
            self._file.append(interrupted.record)
            raise
        record = self._file.append(record)
        self._losses.add(record)
        self._tell("record", details_of(record))
        return record


def details_of(record: Record) -> dict[str, Any]:
    """Return the details of the event ``record`` that says that a case has ended."""
    over_limit = record.status == "ok" and bool(record.broken_limits)
    return {"id": record.id, "status": record.status, "duration_s": record.duration_s, "over_limit": over_limit}


def measure_again(
    suite: Suite,
    path: Path,
    case_ids: Collection[str],
    times: int,
    tell: Tell = silent,
    executor: Opener = LocalExecutor,
) -> Run:
    """Add repeats of some cases to a run that was measured on this machine with the same code.

    Args:
        path: the run's file.
        times: the number of additional repeats per case.

    Raises:
        ResultsError: as for ``run``.
    """
    cases = tuple(case for case in suite.cases if case.id in case_ids)
    with Session(suite, cases, path.parent, resume=path, tell=tell, executor=executor) as session:
        records = read_run(path).records
        done = collections.Counter(record.id for record in records)
        todo = [(case, done[case.id] + number) for number in range(times) for case in cases]
        session.measure_all([*_references_to_repeat(suite, path, cases, records), *todo])
    return read_run(path)


def resumable(suite: Suite, output: str | Path, since: str = "", shard: Shard | None = None) -> Path | None:
    """Return the newest run of a suite in a folder, started at ``since`` (ISO, UTC) or later; ``None`` without one.

    Args:
        shard: the share of the suite that is to be continued; ``None``: a run of the whole suite.

    Raises:
        ResultsError: if the suite, its devices or the machine differ from those of the run.
    """
    found = find_run(Path(output), suite.name, since, str(shard) if shard else None)
    if found is not None:
        _check_resumable(found, suite, machine_of(suite), code_version(suite.code_folder))
    return found


def machine_of(suite: Suite) -> dict[str, Any]:
    """Return the description of this machine for the records of a suite."""
    jobs = [job_from_case(case, 0, suite.settings) for case in suite.cases]
    return machine_here(jobs[0].threads, [job.device for job in jobs])


def _run_to_resume(suite: Suite, folder: Path, resume: bool | Path, shard: Shard | None) -> Path | None:
    """Return the file of the run to resume; ``None`` for a new run."""
    of = str(shard) if shard else None
    path = find_run(folder, suite.name, shard=of) if resume is True else resume or None
    if resume and path is None:
        share_of = f"share {of} of " if of else ""
        raise ResultsError(f"{folder}: no run of {share_of}suite '{suite.name}' there to go on with")
    return path


def header_of(suite: Suite, started: datetime, code: CodeVersion) -> dict[str, Any]:
    """Return the header of a run of a suite, without the machine."""
    header = run_header(suite.name, suite.text, _devices(suite), started, code, suite.plugin_files, suite.own_metrics)
    if suite.tables is None:
        return header
    return {**header, "suite_sha256": _fingerprint(suite), "suite_tables": suite.tables}


def run_header(
    name: str,
    text: str,
    devices: Sequence[str],
    started: datetime,
    code: CodeVersion,
    files: Sequence[PluginFile] = (),
    metrics: Sequence[Metric] = (),
) -> dict[str, Any]:
    """Return the header of a run's file, without the machine.

    Args:
        name: the name of the suite.
        text: the text of the suite.
        code: the commit of the code under test.
        files: the suite's local plug-ins; their fingerprints are stored.
        metrics: the metrics of plug-ins.
    """
    own: dict[str, Any] = {"plugin_files": local_files.fingerprints(files)} if files else {}
    own |= {"own_metrics": [metric.field for metric in metrics]} if metrics else {}
    return {
        "run": f"{name}-{started:%Y%m%dT%H%M%S%fZ}",
        "suite": name,
        "suite_sha256": _sha256(text),
        "suite_text": text,
        "devices": list(devices),
        "started_at": started.isoformat(timespec="microseconds"),
        "code": dataclasses.asdict(code),
        **own,
    }


def run_path(folder: Path, header: Mapping[str, Any]) -> Path:
    """Return the path of a run's file in a folder."""
    return folder / f"{header['run']}.jsonl"


def _check_resumable(path: Path, suite: Suite, machine: Mapping[str, Any], code: CodeVersion | None = None) -> None:
    """Check that new records of a suite on a machine may be added to a run.

    Args:
        code: the commit of the code under test; ``None`` if it is known to be that of the run.

    Raises:
        ResultsError: if the suite, its plug-ins, its devices, the commit or the machine differ.
    """
    header = read_run(path).header
    if header.get("suite") != suite.name or header.get("suite_sha256") != _fingerprint(suite):
        raise ResultsError(
            f"{path}: its suite '{header.get('suite')}' is not '{suite.name}' as it is now; run it afresh"
        )
    changed = local_files.differences(header.get("plugin_files", {}), local_files.fingerprints(suite.plugin_files))
    if changed:
        raise ResultsError(f"{path}: plug-in file {changed[0]} since it began; run it afresh")
    devices = header.get("devices", _devices(suite))
    if devices != _devices(suite):
        raise ResultsError(
            f"{path}: is a run on {' and '.join(devices)}, not on {' and '.join(_devices(suite))};"
            " give the same --device, or run it afresh"
        )
    began_at = (header.get("code") or {}).get("commit")
    if code and code.commit and began_at and code.commit != began_at:
        raise ResultsError(
            f"{path}: began at commit {began_at[:12]}, and {code.commit[:12]} is checked out; check out the first, or"
            " run it afresh"
        )
    unlike = environment.differences(header.get("machine", {}), machine)
    if unlike:
        raise ResultsError(f"{path}: began on another machine ({unlike[0]}); figures of two do not go together")


def _fingerprint(suite: Suite) -> str:
    """Return the fingerprint of a suite: of its tables for a suite in Python, else of its text."""
    return _sha256(suite.text if suite.tables is None else json.dumps(suite.tables, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _devices(suite: Suite) -> list[str]:
    return list(dict.fromkeys(case.device for case in suite.cases))
