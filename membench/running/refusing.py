"""Refusing a case that is estimated to need more memory than there is, before it is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from membench.protocol.messages import AsksForEstimate
from membench.protocol.readings import RankEstimate
from membench.records.metrics import PEAK_OF_PHASE
from membench.running.jobs.case import CaseJob
from membench.running.jobs.estimate import SOURCES, EstimateJob, estimate_from_case
from membench.units import format_bytes

ESTIMATE_TIMEOUT_S = 20
"""Seconds after which a case is tried without an estimate: most take less than three."""


def estimate_of(job: CaseJob) -> EstimateJob:
    """Return the job that estimates a case by its tensors alone: running kernels takes longer."""
    estimate = estimate_from_case(job.case, job.repeat, job.settings, checkouts=job.checkouts)
    return dataclasses.replace(estimate, runs_kernels=False)


def tried(job: CaseJob) -> CaseJob:
    """Return the same job, whose ranks do not ask for an estimate."""
    return dataclasses.replace(job, settings=job.settings.model_copy(update={"estimate": False}))


def refusal(job: CaseJob, asked: Sequence[AsksForEstimate], estimates: Sequence[RankEstimate]) -> str | None:
    """Return why a case is not started, or ``None`` if it is estimated to fit.

    Args:
        asked: what its ranks say of the memory that they may take.
        estimates: of its ranks, one for all that are alike; none if it cannot be estimated.
    """
    highest = [(*_highest(estimate), estimate) for estimate in estimates]
    if not highest:
        return None
    most, where, estimate = max(highest, key=lambda each: each[0])
    free = min(asked, key=lambda each: each.free_bytes)
    count = 1
    if job.device.in_ranks and not job.device.on_gpu:
        count = sum(len(each.ranks) for each in estimates)
        most = sum(len(each.ranks) * size for size, _, each in highest)
    if most <= free.free_bytes:
        return None
    who = "it is estimated to need" if count == 1 else f"its {count} ranks are together estimated to need"
    return (
        f"{who} {format_bytes(most)} {where}; {format_bytes(free.free_bytes)} are {free.where}"
        f" ({SOURCES[estimate.how]}). --no-estimate tries it"
    )


def _highest(estimate: RankEstimate) -> tuple[int, str]:
    """Return the highest live peak of a rank, and where it occurs: in a part of a step, or at the peak of a phase."""
    peaks = {phase: int(estimate.figures.get(metric.field, 0)) for phase, metric in PEAK_OF_PHASE.items()}
    phase = max(peaks, key=lambda each: (peaks[each], each == "run"))
    in_part = estimate.peak_part if phase == "run" else None
    return peaks[phase], f"in {in_part}" if in_part else f"at the {PEAK_OF_PHASE[phase].title}"
