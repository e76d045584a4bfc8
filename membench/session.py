"""A whole run: the cases of some suites, in order, into one file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from membench import environment
from membench.errors import ResultsError
from membench.record import Case
from membench.runner import Runner
from membench.store import Run, RunFile, drop_torn_line, newest_run, read_run
from membench.suite import Suite


def silent(event: str, details: Mapping[str, Any]) -> None:
    """Hears a run's events and says nothing."""
    del event, details


def _fingerprint(suite: Suite) -> str:
    return hashlib.sha256(suite.text.encode()).hexdigest()


def run(
    suite: Suite,
    *,
    keep: Callable[[str], bool] = lambda _: True,
    output: str | Path = "results",
    resume: bool = False,
    tell: Callable[[str, Mapping[str, Any]], None] = silent,
) -> Run:
    """Run a suite's cases and keep a record of each.

    Args:
        suite: what ``load_suite`` returned.
        keep: says which case ids to run; the references that they need are kept too.
        output: the folder for the run's file.
        resume: go on with the newest run of this suite in that folder.
        tell: hears what happens: ``case``, ``phase``, ``memory``, ``progress``, ``record``.

    Raises:
        ResultsError: if there is nothing to resume, the suite has changed since, or the machine is another.
    """
    cases = suite.select(keep)
    folder = Path(output)
    machine = environment.describe(suite.settings.threads or environment.usable_cores())
    if resume:
        path = newest_run(folder, suite.name)
        drop_torn_line(path)
        header = read_run(path).header
        if header["suite"] != suite.name or header["suite_sha256"] != _fingerprint(suite):
            raise ResultsError(
                f"{path}: its suite '{header['suite']}' is not '{suite.name}' as it is now; run it afresh"
            )
        unlike = environment.differences(header["machine"], machine)
        if unlike:
            raise ResultsError(f"{path}: began on a machine of another {unlike[0]}; figures of two do not go together")
        file = RunFile(path)
    else:
        started = datetime.now(UTC)
        path = folder / f"{suite.name}-{started:%Y%m%dT%H%M%S%fZ}.jsonl"
        file = RunFile.create(
            path,
            {
                "run": path.stem,
                "suite": suite.name,
                "suite_sha256": _fingerprint(suite),
                "suite_text": suite.text,
                "machine": machine,
                "started_at": started.isoformat(timespec="seconds"),
            },
        )
    tell("start", {"path": str(path)})
    done = {(record.id, record.repeat) for record in read_run(path).records}
    todo = [(case, r) for r in range(suite.settings.repeats) for case in cases if (case.id, r) not in done]
    with Runner(cases, suite.settings, path.with_suffix(".references"), tell) as runner:
        prepared: dict[str, str | None] = {}
        for number, (case, repeat) in enumerate(todo):
            tell("case", {"id": case.id, "number": number + 1, "of": len(todo)})
            if case.model not in prepared:
                prepared[case.model] = runner.prepare(case)
            record = runner.run_case(case, repeat, suite.limits, prepared[case.model])
            file.append(record)
            tell("record", {"id": case.id, "status": record.status, "duration_s": record.duration_s})
    return read_run(path)


def dry_run(suites: Sequence[Suite], keep: Callable[[str], bool]) -> list[Case]:
    """The cases that a run would measure, in order."""
    return [case for suite in suites for case in suite.select(keep)]
