"""What a training trains, and how coarsely its steps round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from membench.plugins import Technique
from membench.worker.meter import STEPS_FOR_MEMORY
from membench.worker.storages import Storages
from membench.worker.weights import weight_bytes

if TYPE_CHECKING:
    from torch import nn

_LEAST_MEASURED = 2


def figures_of_training(module: nn.Module, techniques: Sequence[Technique]) -> dict[str, Any]:
    """Return the fields of a ``Result`` that say what is trained, and with which numbers."""
    trained_bytes = Storages(p for p in module.parameters() if p.requires_grad).bytes
    return {
        "trained_weights_bytes": trained_bytes,
        # Packed weights are not parameters, so frozen weights are counted as all weights less the trained ones.
        "frozen_weights_bytes": weight_bytes(module) - trained_bytes,
        "computing_bits": _computing_bits(module, techniques),
    }


def steps_for_memory(techniques: Sequence[Technique], *, in_ranks: bool) -> tuple[int, int]:
    """Return how many steps warm a case up, and in how many its memory is measured.

    Trainings that up to three steps warm up take the same number in all, so that what their models learn compares. With
    more of them they take more, since memory is measured in two steps at least.

    Args:
        in_ranks: whether a further step follows in which collectives are counted.
    """
    warmup = max([1, *(technique.warmup_steps for technique in techniques)])
    return warmup, max(_LEAST_MEASURED, STEPS_FOR_MEMORY + 1 - warmup - in_ranks)


def note_on_more_steps(names: Sequence[str], techniques: Sequence[Technique], *, in_ranks: bool) -> list[str]:
    """Return a note if a training takes more steps than others of its suite, since a technique warms up for longer.

    Args:
        names: of the techniques.
        in_ranks: as of ``steps_for_memory``.
    """
    warmup, measured = steps_for_memory(techniques, in_ranks=in_ranks)
    more = warmup + measured + in_ranks - (STEPS_FOR_MEMORY + 1)
    if more <= 0:
        return []
    name = next(name for name, each in zip(names, techniques, strict=True) if each.warmup_steps == warmup)
    steps = "step" if more == 1 else "steps"
    return [f"'{name}' warms up for {warmup} steps: loss and quality are those of a training {more} {steps} longer"]


def _computing_bits(module: nn.Module, techniques: Sequence[Technique]) -> float:
    """Return the bits of the coarsest numbers among floating-point weights, and those that techniques name."""
    import torch

    of_weights = {torch.finfo(each.dtype).bits for each in module.parameters() if each.is_floating_point()}
    named = [bits for technique in techniques if (bits := technique.computing_bits()) is not None]
    return min([32, *of_weights, *named])
