"""Whether ranks train as a single device does: their losses beside those of the reference, step by step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from membench.protocol.case import REFERENCE, Case, Group
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.running.derived_metrics import DerivedMetrics

Losses = Sequence[float | None]
"""The training loss of each step, in nats; ``None`` where it is not finite."""

_FINAL, _DIFFERENCE = "final_loss_nats", "loss_difference_nats"

_EXPLAINED_PER_STEP = ((32, 1e-5), (16, 2**-8), (0, 1e-2))
"""By the bits of the coarsest numbers, the share of the loss by which each step may drive two trainings apart that
differ in the order of additions alone. Measured in 11 steps of ``untrained-tiny`` under ``ddp``: 2e-7 of the loss at
most in fp32, and 1.3e-5 in bf16; ``fsdp`` in bf16 moves a trained model by 1.0e-3 in one step. In 16 bits it is what
bfloat16 rounds to."""


@dataclass(frozen=True)
class LossesAlone:
    """The losses of trainings on a single device that those of ranks are held against.

    Attributes:
        reference: those of the reference; ``None`` if it was not measured before.
        unspread: those of the same stack without what spreads it over ranks, likewise.
        unspread_name: its technique and device.
    """

    reference: Losses | None
    unspread: Losses | None
    unspread_name: str


class KnownLosses:
    """The losses of a run's cases on single devices, as far as they are measured."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._losses: dict[tuple[Group, str], Losses] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Add the losses of a case if it ran on one device and trained."""
        if len(record.processes) == 1 and record.status in ("ok", "diverged"):
            losses = record.processes[0].losses_nats
            if losses:
                self._losses.setdefault((record.group, record.technique), tuple(losses))

    def beside(self, case: Case) -> LossesAlone | None:
        """Return the losses that a case in ranks is held against; ``None`` for other cases."""
        if case.unspread is None:
            return None
        group = case.reference_group
        return LossesAlone(
            self._losses.get((group, REFERENCE)), self._losses.get((group, case.unspread)),
            f"{case.unspread} on {group[2]}",
        )  # fmt: skip


def mean_over_ranks(ranks: Sequence[Losses | None]) -> Losses:
    """Return the loss of each step, the mean over the ranks that have one; empty if none has any.

    A step counts if all of these ranks took it. Ranks without losses, such as a pipeline's first stage, do not count.
    """
    steps = zip(*(losses for losses in ranks if losses), strict=False)
    return [None if None in step else statistics.fmean(loss for loss in step if loss is not None) for step in steps]


def add(found: DerivedMetrics, ranks: Sequence[Losses | None], alone: LossesAlone | None, bits: float | None) -> None:
    """Add the final loss and the distance from the reference's losses, and a remark if that is not explained.

    Args:
        ranks: the losses of each rank.
        bits: of the coarsest numbers that the training computes with; ``None``: not known.
    """
    losses = mean_over_ranks(ranks)
    if not losses:
        return
    reference = alone.reference if alone else None
    # A technique may take more steps to warm up, and the losses of different batches do not compare.
    last = min(len(losses), len(reference or losses)) - 1
    final = losses[last]
    if final is None:
        found.add_unknown(_FINAL, "it is not finite")
    else:
        source = f"cross entropy in fp32 of step {last + 1}, mean over the ranks that have one"
        found.add(_FINAL, final, source)
    if alone is None or reference is None:
        found.add_unknown(_DIFFERENCE, "the reference was not measured before")
        return
    apart = _furthest(losses, reference)
    if apart is None:
        found.add_unknown(_DIFFERENCE, "the losses of the first step are not finite")
        return
    source = f"largest difference from the reference's losses over {apart.steps} steps, mean over ranks"
    found.add(_DIFFERENCE, apart.nats, source)
    _judge(found, losses, alone, bits)


@dataclass(frozen=True)
class _Apart:
    """By how much two trainings differ at most: where, and the two losses there.

    Attributes:
        number: the step, from 0.
        steps: the number of steps that both took with finite losses.
    """

    number: int
    own_nats: float
    other_nats: float
    steps: int

    @property
    def nats(self) -> float:
        return abs(self.own_nats - self.other_nats)


def _furthest(own: Losses, other: Losses) -> _Apart | None:
    """Return where two trainings differ most, before one of them is not finite; ``None`` if that is the first step."""
    both: list[tuple[float, float]] = []
    for first, second in zip(own, other, strict=False):
        if first is None or second is None:
            break
        both.append((first, second))
    if not both:
        return None
    number = max(range(len(both)), key=lambda step: abs(both[step][0] - both[step][1]))
    return _Apart(number, *both[number], len(both))


def _judge(found: DerivedMetrics, losses: Losses, alone: LossesAlone, bits: float | None) -> None:
    """Add a remark if a training is further from the same one on a single device than its arithmetic explains."""
    how = found.obtained[_DIFFERENCE]
    apart = None if alone.unspread is None else _furthest(losses, alone.unspread)
    if alone.unspread is None:
        found.notes.append(f"whether it is the same training was not judged: {alone.unspread_name} was not measured")
    if apart is None or bits is None:
        return
    per_step = next(share for least_bits, share in _EXPLAINED_PER_STEP if bits >= least_bits)
    explained_nats = per_step * (apart.number + 1) * abs(apart.other_nats)
    how |= {"same_training": alone.unspread_name, "apart_nats": apart.nats, "explained_nats": explained_nats}
    if apart.nats > explained_nats:
        shown = METRIC_OF_FIELD[_DIFFERENCE].format
        found.remarks.append(
            f"it is not the same training as {alone.unspread_name}: the loss of step {apart.number + 1} is"
            f" {apart.own_nats:.4f} nats, not {apart.other_nats:.4f}, and arithmetic in {bits:g} bits explains"
            f" {shown(explained_nats)}"
        )
