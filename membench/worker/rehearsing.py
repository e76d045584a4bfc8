"""A rehearsal of a case on a tiny model, before anything is measured."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from membench.errors import summary
from membench.worker import checkpoint, device, output_check
from membench.worker.agreement import come_through
from membench.worker.assembly import Assembly

if TYPE_CHECKING:
    from torch import nn


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
    try:
        module = assembly.make()
        module.train(case.workload.trains)
        refused = output_check.refusal_of_rehearsed(module, case.workload, assembly.context, case.model_name)
        if refused is None:
            _step(assembly, module)
            checkpoint.save(module, assembly.context.scratch, assembly.techniques, assembly.context)
    except Exception as error:
        come_through(case.context.ranks, "rehearsal", error)
        if case.model.miniature() is not None:
            return f"rehearsing ended in {summary(error)}"
        with contextlib.suppress(Exception):  # without techniques, for what the workload alone sets up
            plain = dataclasses.replace(assembly, techniques=(), names=())
            _step(plain, plain.make().train(case.workload.trains))
        return "no small model takes the place of this one"
    if refused is not None:
        raise refused
    come_through(case.context.ranks, "rehearsal")
    return None


def _step(case: Assembly, module: nn.Module) -> None:
    case = case.store(module)
    case.workload.start(module, case.tokens(module), case.techniques, case.context)()
