"""What kept runs know of the cost of techniques in quality and speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from membench.protocol.case import REFERENCE
from membench.records.comparison import Comparison
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.run_file import read_run
from membench.units import format_ratio


@dataclass(frozen=True)
class KnownCost:
    """What a stack cost in a case that was measured, compared with the same case without it.

    Attributes:
        model, workload, device: of the case.
        time_ratio: of the time of a token, or of a step; ``None``: not known, or disturbed by other processes.
        lost: in quality, in the unit of its metric; 0: none that noise cannot explain; ``None``: not known.
        quality: the title of that metric.
    """

    model: str
    workload: str
    device: str
    time_ratio: float | None
    lost: float | None
    quality: str | None

    def __str__(self) -> str:
        said = []
        if self.lost is not None:
            loss = f"{self.lost:.3g} {self.quality} lost" if self.lost > 0 else "no loss measured"
            said.append(f"{loss} on {self.model}")
        if self.time_ratio is not None:
            said.append(f"{format_ratio(self.time_ratio)} time ({self.model}, {self.workload}, {self.device})")
        return "; ".join(said)


def known_costs(runs: Iterable[Path]) -> Mapping[str, Sequence[KnownCost]]:
    """Return what runs know of each stack that they measured, by its name.

    Raises:
        ResultsError: if a file is not a run.
    """
    found: dict[str, list[KnownCost]] = {}
    for path in runs:
        comparison = Comparison([record for record in read_run(path).records if record.status == "ok"])
        for group in comparison.groups:
            for stack in comparison.techniques(group):
                if stack != REFERENCE and (cost := _cost(comparison, group, stack)) is not None:
                    found.setdefault(stack, []).append(cost)
    return found


def _cost(comparison: Comparison, group: tuple[str, str, str], stack: str) -> KnownCost | None:
    pace, reference = comparison.pace_s(group, stack), comparison.pace_s(group, REFERENCE)
    time_ratio = pace / reference if pace and reference else None
    field = comparison.quality_field(group)
    lost = comparison.lost(group, stack, field) if field else None
    if time_ratio is None and lost is None:
        return None
    return KnownCost(*group, time_ratio, lost, METRIC_OF_FIELD[field].title if field else None)


def quality_rank(stack: str, known: Mapping[str, Sequence[KnownCost]]) -> int:
    """Return 0 if no loss of quality was measured of a stack or its members, 1 if that is not known, 2 if one was."""
    members = [stack] if _losses(stack, known) else stack.split("+")
    losses = [_losses(member, known) for member in members if member != REFERENCE]
    if any(loss > 0 for each in losses for loss in each):
        return 2
    return 0 if all(losses) else 1


def _losses(stack: str, known: Mapping[str, Sequence[KnownCost]]) -> list[float]:
    return [cost.lost for cost in known.get(stack, ()) if cost.lost is not None]
