"""Shares of a suite, so that several machines or jobs measure it without knowing of each other."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from membench.errors import SuiteError
from membench.plugins import Model, Workload, registry
from membench.protocol.case import Case, Group, Plugin

_WRITTEN = re.compile(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})")
_ALWAYS_S = 2.0
"""What a case takes whatever it measures: importing, building, judging."""
_FLOPS_PER_S = 2e10
_PASSES_OF_TRAINING = 3
"""Backward passes take twice as long as forward ones."""


@dataclass(frozen=True)
class Shard:
    """One of several shares of a suite.

    Attributes:
        number: of the share, from 1.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the share that a text names: ``3/16``.

        Raises:
            SuiteError: if it names none.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None or int(found[1]) > int(found[2]):
            raise SuiteError(f"--shard {text}: write which share of how many, such as 3/16")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """As people write it."""
        return f"{self.number}/{self.of}"


def share(cases: Sequence[Case], shard: Shard) -> tuple[Case, ...]:
    """Return a share of cases, in their order: whole groups, each with its reference.

    The largest group goes to the share that has least so far, by a rough estimate of how long cases take. All shares of
    the same cases together are all of them, whatever machine makes them.
    """
    groups: dict[Group, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.reference_group, []).append(case)
    costs = {group: sum(map(_seconds, members)) for group, members in groups.items()}
    shares = [(0.0, number) for number in range(1, shard.of + 1)]
    chosen = set()
    for group in sorted(groups, key=lambda group: -costs[group]):  # a stable sort: equal ones stay in the suite's order
        taken_s, number = heapq.heappop(shares)
        heapq.heappush(shares, (taken_s + costs[group], number))
        if number == shard.number:
            chosen.add(group)
    return tuple(case for case in cases if case.reference_group in chosen)


def _seconds(case: Case) -> float:
    """Return about how long a case takes on a CPU; only the proportions matter."""
    if case.command is not None:
        return _ALWAYS_S
    model, workload = _made("model", case.model_plugin), _made("workload", case.workload_plugin)
    shape = model.shape if isinstance(model, Model) else None
    tokens = workload.tokens_per_step() if isinstance(workload, Workload) else None
    if shape is None or tokens is None or not isinstance(workload, Workload):
        return _ALWAYS_S
    per_layer = 4 * shape.width**2 + 3 * shape.width * shape.inner_width
    parameters = shape.layers * per_layer + shape.vocabulary * shape.width
    passes = _PASSES_OF_TRAINING if workload.trains else 1
    return _ALWAYS_S + 2 * parameters * tokens * passes / _FLOPS_PER_S


def _made(kind: str, plugin: Plugin) -> object:
    return registry.create(kind, plugin.use, plugin.options, plugin.files)
