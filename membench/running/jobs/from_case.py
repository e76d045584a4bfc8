"""Creation of jobs from the cases of a suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from membench.host.device import Device
from membench.protocol.case import Case
from membench.protocol.requests import Checkouts
from membench.running.jobs.case import CaseJob
from membench.running.jobs.runnable import RunnableJob
from membench.running.jobs.script import ScriptJob
from membench.running.losses import KnownLosses
from membench.suite.schema import Settings

JobMaker: TypeAlias = Callable[
    [Case, int, Settings, Mapping[str, float] | None, Checkouts | None, KnownLosses | None], RunnableJob
]


def job_from_case(
    case: Case,
    repeat: int,
    settings: Settings,
    limits: Mapping[str, float] | None = None,
    checkouts: Checkouts | None = None,
    losses: KnownLosses | None = None,
) -> RunnableJob:
    """Return the job that measures a case once; a case with a command is a user's program.

    Args:
        losses: those known of the run, which cases in ranks are held against.
    """
    device = Device.parse(case.device)
    if case.command is not None:
        return ScriptJob(id=case.id, repeat=repeat, device=device, limits=limits or {}, settings=settings, case=case)
    return CaseJob(
        id=case.id, repeat=repeat, device=device, limits=limits or {}, settings=settings, case=case,
        checkouts=checkouts, losses=None if losses is None else losses.beside(case),
    )  # fmt: skip
