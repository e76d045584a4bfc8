"""What a stack needs at each part of a step, and what keeps it from fitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.errors import SuiteError
from membench.estimating.devices import Budget
from membench.estimating.fit import PEAK, Question
from membench.estimating.lanes import lanes
from membench.estimating.stacks import Stack, Workload, candidates
from membench.protocol.readings import PARTS

_NEIGHBOURS = 12


@dataclass(frozen=True)
class Why:
    """What a stack needs.

    Attributes:
        needed_bytes: of the device that needs the most: the live peak of a step.
        part: of the step, in which the peak occurs.
        peaks_bytes: the live peak of each part.
        breakdown_bytes: what is alive at the peak of each part, by category.
        neighbours_bytes: what stacks need that differ from it by one technique, those that need less.
    """

    model: str
    stack: str
    budget: Budget
    workload: Workload
    needed_bytes: int
    part: str | None
    how: str
    peaks_bytes: Mapping[str, int]
    breakdown_bytes: Mapping[str, Mapping[str, int]]
    neighbours_bytes: Mapping[str, int]

    @property
    def left_bytes(self) -> int:
        """What it leaves on each device; negative if it does not fit."""
        return self.budget.per_device_bytes - self.needed_bytes


def why(model: str, stack: str, **asked: Any) -> Why:
    """Trace a stack with all layers of a model, and stacks that differ from it by one technique.

    Args:
        model, asked: as for ``fit``.

    Raises:
        SuiteError, PluginError: as for ``fit``, or if the stack cannot be estimated.
    """
    question = Question.asked(
        model, asked.get("device"), asked.get("memory"), asked.get("workload", "train"), asked.get("batch_size"),
        asked.get("length"),
    )  # fmt: skip
    chosen = Stack.of(stack)
    near = [each for each in candidates(question.workload, question.budget.count) if _differs_by_one(chosen, each)][
        :_NEIGHBOURS
    ]
    job = question.job(chosen, question.workload, extrapolates=False)
    jobs = {each.name: question.job(each, question.workload, extrapolates=True) for each in near}
    with lanes([job, *jobs.values()]) as submit:
        whole = submit(job)
        others = {name: submit(other) for name, other in jobs.items()}
        record = whole.result()
        needs = {name: other.result().metrics.get(PEAK) for name, other in others.items()}
    needed = record.metrics.get(PEAK)
    if needed is None:
        raise SuiteError(f"{stack}: {record.message or record.status}")
    (process,) = record.processes
    less = {name: int(size) for name, size in needs.items() if size and size < needed}
    return Why(
        question.name,
        stack,
        question.budget,
        question.workload,
        int(needed),
        process.peak_part,
        str(record.obtained[PEAK].get("source", "")),
        {part: int(size) for part in PARTS if (size := record.metrics.get(f"{part}_peak_live_bytes"))},
        process.breakdown_bytes or {},
        dict(sorted(less.items(), key=lambda each: each[1])),
    )


def _differs_by_one(chosen: Stack, other: Stack) -> bool:
    """Whether a stack has one member more, or another one in the place of one."""
    ours, theirs = set(chosen.members), set(other.members)
    return len(theirs - ours) == 1 and len(ours - theirs) <= 1
