"""A rehearsal of a case on a tiny model, before anything is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from membench.errors import summary
from membench.plugins import Ranks
from membench.worker import checkpoint, device, output_check
from membench.worker.assembly import Assembly

if TYPE_CHECKING:
    from torch import nn


_OTHERS_WITHIN_S = 10.0
"""Seconds in which the rehearsals of the other ranks must end after that of one has failed."""
_MOST_ATTEMPTS = 2
"""A rehearsal that fails with kernels from an archive is repeated without them."""


def rehearse(case: Assembly) -> str | None:
    """Run the case on a tiny model before the baseline, so that libraries complete their one-time initialization.

    Otherwise the first measured phase would include thread pools, the CUDA context, code pages of kernels and
    lazily imported modules, some 10 MiB.

    Returns:
        why it was not rehearsed whole, if it was not. The measured case then either fails, too, or the error was due to
        the small shapes. What a generic model that took the place of the case's own fails with is not about the case.

    Raises:
        Exception: what it failed with, if it failed on this rank and not on the others.
        plugins.WrongOutput: if the model's own miniature does not return what the workload needs.
        plugins.Unsuitable: if the workload cannot run it.
    """
    device.initialize(case.context.device)
    assembly = case.rehearsed()
    if assembly is None:
        return None
    with contextlib.suppress(Exception):
        case.model.skeleton()  # imports the model's own code, which the generic model does not use
    ranks = case.context.ranks
    try:
        module = assembly.make()
        module.train(case.workload.trains)
        refused = output_check.refusal_of_rehearsed(module, case.workload, assembly.context, case.model_name)
        if refused is None:
            _step(assembly, module)
            checkpoint.save(module, assembly.context.scratch, assembly.techniques, assembly.context)
    except Exception as error:
        if ranks is not None and not all_have_ended(ranks):
            raise  # the others wait for this rank in a collective, without end
        if case.model.miniature() is not None:
            return f"rehearsing ended in {summary(error)}"
        with contextlib.suppress(Exception):  # without techniques, for what the workload alone sets up
            plain = dataclasses.replace(assembly, techniques=(), names=())
            _step(plain, plain.make().train(case.workload.trains))
        return "no small model takes the place of this one"
    if ranks is not None:
        _say_ended(ranks)
    if refused is not None:
        raise refused
    return None


def all_have_ended(ranks: Ranks, within_s: float = _OTHERS_WITHIN_S) -> bool:
    """Say that the rehearsal of this rank has ended, and return whether that of all others does soon, too.

    A case that fails in its small shapes does so on all ranks, and is measured nevertheless.
    """
    attempt, deadline = _say_ended(ranks), time.monotonic() + within_s
    while time.monotonic() < deadline:
        if all(_ended_file(ranks, rank, attempt).exists() for rank in range(ranks.of)):
            return True
        time.sleep(0.05)
    return False


def _say_ended(ranks: Ranks) -> int:
    attempt = sum(_ended_file(ranks, ranks.number, each).exists() for each in range(_MOST_ATTEMPTS))
    _ended_file(ranks, ranks.number, attempt).touch()
    return attempt


def _ended_file(ranks: Ranks, rank: int, attempt: int) -> Path:
    return ranks.shared / f"rehearsed-{rank}-{attempt}"


def _step(case: Assembly, module: nn.Module) -> None:
    case = case.store(module)
    case.workload.start(module, case.tokens(module), case.techniques, case.context)()
