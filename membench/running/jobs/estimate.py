"""The job that estimates a case without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from membench.errors import SuiteError
from membench.host import environment
from membench.host.device import Device
from membench.protocol import requests
from membench.protocol.case import Case, Plugin
from membench.protocol.forking import StartWorker
from membench.protocol.readings import RankEstimate
from membench.protocol.requests import Checkouts
from membench.records.highest_peak import HIGHEST
from membench.running import deriving, over_ranks
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.jobs.case import CaseJob
from membench.running.losses import KnownLosses
from membench.running.references import References
from membench.suite.schema import Settings

SOURCES = {
    "traced": "traced: the case's own stages on fake tensors",
    "arithmetic": "arithmetic: shapes, and what techniques name",
}
"""How estimates are obtained, in words."""


@dataclass(frozen=True, kw_only=True)
class EstimateJob(CaseJob):
    """An estimate of a case, made in one worker on a CPU, wherever the case would run and on however many ranks.

    Attributes:
        estimated_on: where the case would run.
        runs_kernels: whether kernels are run to see what they take beside tensors, if that is not known yet.
        extrapolates: whether a deep model's steps are traced with few of its layers alone.
    """

    estimated_on: Device
    runs_kernels: bool = True
    extrapolates: bool = False

    @property
    def preparation(self) -> Plugin | None:
        return None

    def order(self, number: int, references: References) -> StartWorker:
        measuring = requests.decode(super().order(number, references).request)
        assert isinstance(measuring.work, requests.MeasureCase)
        threads: int | None = None
        if self.runs_kernels:
            threads = self.settings.threads or max(1, environment.usable_cores() // self.estimated_on.count)
        work = requests.EstimateCase(measuring.work, str(self.estimated_on), threads, self.extrapolates)
        return StartWorker(requests.encode(replace(measuring, work=work)), number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        (result,) = readings.results
        if result is None or not result.estimates:
            return DerivedMetrics()
        by_rank = {rank: _of_rank(estimate) for estimate in result.estimates for rank in estimate.ranks}
        found = [by_rank[rank] for rank in sorted(by_rank)]
        return over_ranks.combine(found) if self.estimated_on.in_ranks else found[0]


def _of_rank(estimate: RankEstimate) -> DerivedMetrics:
    found = DerivedMetrics()
    left_out = f"; it leaves out {', '.join(estimate.leaves_out)}" if estimate.leaves_out else ""
    layers = [str(number) for number in estimate.from_layers]
    extrapolated = f", extrapolated from {', '.join(layers[:-1])} and {layers[-1]} layers" if layers else ""
    for field, value in estimate.figures.items():
        added = "".join(f", with {size:,} B of {what}" for what, size in estimate.added_bytes.items())
        source = SOURCES[estimate.how] + extrapolated + (added if "peak" in field else "") + left_out
        found.add(field, value, source, "about")
    deriving.highest_peak(found)
    if HIGHEST in found.obtained:
        found.obtained[HIGHEST]["bound"] = "about"
    return found


def estimate_from_case(
    case: Case,
    repeat: int,
    settings: Settings,
    limits: Mapping[str, float] | None = None,
    checkouts: Checkouts | None = None,
    losses: KnownLosses | None = None,
) -> EstimateJob:
    """Return the job that estimates a case.

    Raises:
        SuiteError: if the case is a program, of which nothing is known before it runs.
    """
    del checkouts, losses
    if case.command is not None:
        raise SuiteError(f"case '{case.id}': a program cannot be estimated")
    return EstimateJob(
        id=case.id, repeat=repeat, device=Device("cpu"), limits=limits or {}, settings=settings, case=case,
        estimated_on=Device.parse(case.device),
    )  # fmt: skip
