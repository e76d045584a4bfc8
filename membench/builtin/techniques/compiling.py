"""Kernels made for the model by torch.compile."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, ClassVar

from membench.builtin.techniques.optimizers import missing_compiler
from membench.host.device import Device
from membench.plugins import Context, Setting, Technique

if TYPE_CHECKING:
    from torch import nn


class Compile(Technique):
    """The decoder compiled by torch.compile (TorchDynamo, Inductor): fewer kernels, fewer tensors between them.

    Elementwise chains become one kernel each, so that what lay between them is never written, and in training a cut
    through the joint graph chooses what is kept and what is computed again (Ansel et al. 2024, PyTorch 2). Matrix
    products and attention stay the library's.

    Compiling happens in the first step: its time and memory, those of the C++ compiler's processes included, are
    ``warmup``'s. The model's kernels are compiled anew in each run, as on a machine that never saw it, and in the
    worker alone: no pool of compiling processes stays beside the measured steps. A model of transformers is compiled
    without its output head, one matrix product, so that losses that take the head apart run compiled, too. Limits:
    what the compiler keeps in the process, 20 to 50 MiB, counts as live memory on a CPU; a change of shape compiles
    anew, as in ``evaluate``; what cannot be traced runs as it is, and the record says so.
    """

    imports = ("torch", "torch._dynamo", "torch._inductor")
    acts_on: ClassVar[str] = "time, activations"

    def refuse(self, setting: Setting) -> str | None:
        if Device.parse(setting.device).on_gpu and importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton for a GPU, and it is not installed"
        return missing_compiler(setting.device)

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        import torch
        import torch._dynamo.utils
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1
        if context.rehearsal:
            # Imports, the compiler's header, what it finds out of the processor: once for all, as with any library.
            torch.compile(torch.sin)(torch.ones(64, device=context.device, requires_grad=True)).sum().backward()
            return module
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        causal = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
        getattr(causal, "base_model", causal).compile()
        return module

    def remark(self, module: nn.Module, context: Context) -> str | None:
        from torch._dynamo.utils import counters

        reasons = [reason for kind in ("unimplemented", "graph_break") for reason in counters[kind]]
        why = f": {reasons[0].splitlines()[0]}" if reasons else ""
        if not counters["stats"]["unique_graphs"]:
            return f"compiled nothing, and the model ran as without it{why}"
        skipped = counters["frames"]["total"] - counters["frames"]["ok"]
        if reasons or skipped:
            return f"did not compile the whole model; places left out: {max(len(reasons), skipped)}{why}"
        return None
