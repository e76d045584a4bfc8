"""A rehearsal of a case on a tiny model, before anything is measured."""

from __future__ import annotations

import contextlib

from membench.errors import summary
from membench.worker import device, output_check
from membench.worker.assembly import Assembly


def rehearse(case: Assembly) -> str | None:
    """Run the case on a tiny model before the baseline, so that libraries complete their one-time initialization.

    Otherwise the first measured phase would include thread pools, the CUDA context, code pages of kernels and
    lazily imported modules, some 10 MiB.

    Returns:
        the error, if the rehearsal fails. The measured case then either fails, too, or the error was due to the
        small shapes.

    Raises:
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
            assembly = assembly.store(module)
            case.workload.start(module, assembly.tokens(module), case.techniques, assembly.context)()
    except Exception as error:
        return summary(error)
    if refused is not None:
        raise refused
    return None
