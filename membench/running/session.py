"""A whole run: the cases of a suite, in order, into one file."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from membench.errors import ResultsError
from membench.host import environment
from membench.plugins import local_files
from membench.protocol.case import Case, PluginFile
from membench.protocol.requests import Checkouts
from membench.records.metric import Metric
from membench.records.record import Record
from membench.records.run_file import Run, RunFile, find_run, read_run
from membench.running.executors.executor import Opener
from membench.running.executors.local import LocalExecutor, machine_here
from membench.running.jobs.kind import RunnableJob
from membench.running.jobs.of_suite import job_of
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.runner import Interrupted
from membench.suite.suite import Suite


def silent(event: str, details: Mapping[str, Any]) -> None:
    """Hears a run's events and says nothing."""
    del event, details


def run(
    suite: Suite,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    resume: bool | Path = False,
    tell: Tell = silent,
    executor: Opener = LocalExecutor,
) -> Run:
    """Run a suite's cases and keep a record of each.

    Args:
        suite: what ``load_suite`` returned.
        keep: says which case ids to run; the references that they need are kept too.
        output: the folder for the run's file.
        resume: go on with a run: the newest of this suite in that folder, or the one whose file is given.
        tell: hears what happens, as a name and details. It is called between two looks at the measured process, so it
            should be quick:

            ========  ==========================================================================================
            start     ``path`` of the run's file, ``of``: how many cases are to be measured
            case      ``id``, ``number`` (from 1), ``of``: a case begins
            progress  ``what``, ``done``, ``total``: a model is made ready, once, before its first case
            baseline  ``bytes`` resident in the worker before anything of the case; figures count from there
            phase     ``phase``: one begins
            memory    ``bytes`` resident in the worker and its children now, the baseline included
            record    ``id``, ``status``, ``duration_s``: a case has ended and its record is on the disk
            ========  ==========================================================================================

        executor: opens what runs the cases; without one they run on this machine.

    Raises:
        ResultsError: if there is nothing to resume, the suite, its devices or the machine have changed since, or the
            run's file cannot be written; the records written before are kept.
    """
    cases = suite.select(keep)
    with Session(suite, cases, Path(output), resume=resume, tell=tell, executor=executor) as session:
        done = {(record.id, record.repeat) for record in read_run(session.path).records}
        todo = [(case, r) for r in range(suite.settings.repeats) for case in cases if (case.id, r) not in done]
        session.measure_all(todo)
    return read_run(session.path)


class Session:
    """A run under way: its file is open, its executor ready. Use as a context manager."""

    def __init__(
        self,
        suite: Suite,
        cases: tuple[Case, ...],
        output: Path,
        *,
        resume: bool | Path = False,
        tell: Tell = silent,
        executor: Opener = LocalExecutor,
        code: Mapping[str, Any] | None = None,
        checkouts: Checkouts | None = None,
    ) -> None:
        """Open the run's file; ``run`` says what the arguments are.

        Args:
            cases: all that may be measured.
            code: which commit of what is under test it is, for the header of a new run.
            checkouts: whose code must not be measured and whose is.

        Raises:
            ResultsError: as ``run`` does.
        """
        self._suite, self._tell, self._checkouts = suite, tell, checkouts
        going_on = _to_go_on_with(suite, output, resume)
        header = header_of(suite, datetime.now(UTC))
        self.path = going_on or run_path(output, header)
        jobs = [self._job(case, 0) for case in cases]
        self._executor = executor(Needs.of(jobs, references(self.path)), tell)
        try:
            machine = self._executor.machine
            if going_on:
                _refuse_what_differs(going_on, suite, machine)
                self._file = RunFile.reopen(going_on)
            else:
                self._file = RunFile.create(
                    self.path, {**header, "machine": machine, **({"code": code} if code else {})}
                )  # fmt: skip
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
        finally:
            self._file.__exit__(kind, error, at)

    def _job(self, case: Case, repeat: int) -> RunnableJob:
        return job_of(case, repeat, self._suite.settings, self._suite.limits, self._checkouts)

    def measure_all(self, todo: Sequence[tuple[Case, int]], *, afresh: bool = False) -> None:
        """Measure cases, each with the number of its repeat, one after the other.

        Args:
            afresh: whether each repeat begins as another run would, with a fork server of its own.
        """
        self._tell("start", {"path": str(self.path), "of": len(todo)})
        begun: int | None = None
        for number, (case, repeat) in enumerate(todo, 1):
            if afresh and repeat != begun:
                begun = repeat
                self._executor.begin_afresh()
            self._tell("case", {"id": case.id, "number": number, "of": len(todo)})
            self.measure(case, repeat)

    def measure(self, case: Case, repeat: int) -> Record:
        """Measure a case and keep its record."""
        try:
            record = self._executor.measure(self._job(case, repeat))
        except Interrupted as interrupted:
            self._file.append(interrupted.record)
            raise
        self._file.append(record)
        self._tell("record", {"id": case.id, "status": record.status, "duration_s": record.duration_s})
        return record


def measure_again(
    suite: Suite,
    path: Path,
    case_ids: Collection[str],
    times: int,
    tell: Tell = silent,
    executor: Opener = LocalExecutor,
) -> Run:
    """Add repeats of some cases to a run, made here by the same code.

    Args:
        path: of the run's file.
        times: how many more repeats of each.

    Raises:
        ResultsError: as ``run``.
    """
    cases = tuple(case for case in suite.cases if case.id in case_ids)
    with Session(suite, cases, path.parent, resume=path, tell=tell, executor=executor) as session:
        done = collections.Counter(record.id for record in read_run(path).records)
        session.measure_all([(case, done[case.id] + number) for number in range(times) for case in cases])
    return read_run(path)


def resumable(suite: Suite, output: str | Path, since: str = "") -> Path | None:
    """The newest run of a suite in a folder, begun at ``since`` (ISO, UTC) or later; ``None`` if there is none.

    Raises:
        ResultsError: if what would be measured now does not belong into it.
    """
    found = find_run(Path(output), suite.name, since)
    if found is not None:
        _refuse_what_differs(found, suite, machine_of(suite))
    return found


def machine_of(suite: Suite) -> dict[str, Any]:
    """The description of this machine that stands in the records of a suite."""
    jobs = [job_of(case, 0, suite.settings) for case in suite.cases]
    return machine_here(jobs[0].threads, [job.device for job in jobs])


def _to_go_on_with(suite: Suite, folder: Path, resume: bool | Path) -> Path | None:
    """The run to go on with; ``None`` for a new one."""
    path = find_run(folder, suite.name) if resume is True else resume or None
    if resume and path is None:
        raise ResultsError(f"{folder}: no run of suite '{suite.name}' there to go on with")
    return path


def header_of(suite: Suite, started: datetime) -> dict[str, Any]:
    """What a run's file says of a run of this suite, the machine aside."""
    header = run_header(suite.name, suite.text, _devices(suite), started, suite.plugin_files, suite.own_metrics)
    if suite.tables is None:
        return header
    return {**header, "suite_sha256": _fingerprint(suite), "suite_tables": suite.tables}


def run_header(
    name: str,
    text: str,
    devices: Sequence[str],
    started: datetime,
    files: Sequence[PluginFile] = (),
    metrics: Sequence[Metric] = (),
) -> dict[str, Any]:
    """What a run's file says of the run, the machine aside.

    Args:
        name: of the suite.
        text: the suite as it is written.
        files: the suite's own plug-ins, of which fingerprints are kept.
        metrics: those of plug-ins.
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
        **own,
    }


def run_path(folder: Path, header: Mapping[str, Any]) -> Path:
    """The file of a run in a folder."""
    return folder / f"{header['run']}.jsonl"


def references(path: Path) -> Path:
    """The folder of the reference cases' logits that goes with a run's file."""
    return path.with_suffix(".references")


def _refuse_what_differs(path: Path, suite: Suite, machine: Mapping[str, Any]) -> None:
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
    unlike = environment.differences(header.get("machine", {}), machine)
    if unlike:
        raise ResultsError(f"{path}: began on another machine ({unlike[0]}); figures of two do not go together")


def _fingerprint(suite: Suite) -> str:
    """Of what is measured: of a suite in Python what it came to, whatever its text does besides."""
    return _sha256(suite.text if suite.tables is None else json.dumps(suite.tables, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _devices(suite: Suite) -> list[str]:
    return list(dict.fromkeys(case.device for case in suite.cases))
