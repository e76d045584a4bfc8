"""Techniques on two ranks, of which one rank fails, in one of the ways in which ranks do."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, ClassVar, Literal

from membench.plugins import Context, Parallel

if TYPE_CHECKING:
    from torch import nn


class Fails(Parallel):
    """One rank fails in a forward pass, while the other waits for it in a collective; before that all is well."""

    shares_batch: ClassVar[bool] = True
    how: Literal["exits", "is killed", "takes no more", "asks too much", "hangs", "raises", "raises after the others"]
    where: Literal["apply", "run"] = "run"
    rank: int = 1

    def parallelize(self, module: nn.Module, context: Context) -> nn.Module:
        import torch
        from torch import distributed

        assert context.ranks is not None
        is_culprit = context.ranks.number == self.rank
        if self.where == "apply":
            if is_culprit:
                self._fail()
            distributed.all_reduce(torch.ones(1))
            return module
        passes = 0

        def meet(*_: object) -> None:
            nonlocal passes
            passes += 1
            if passes > 3:  # the steps that warm up are over
                if is_culprit:
                    self._fail()
                distributed.all_reduce(torch.ones(1))

        module.register_forward_pre_hook(meet)
        return module

    def _fail(self) -> None:
        import torch

        match self.how:
            case "exits":
                os._exit(7)
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "takes no more":
                raise MemoryError("no room on this rank")
            case "asks too much":
                import resource

                with open("/proc/self/statm") as statm:
                    taken_bytes = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (taken_bytes + 2**26, taken_bytes + 2**26))
                torch.ones(2**28)
            case "hangs":
                time.sleep(600)
            case "raises":
                raise ValueError("only on this rank")
            case "raises after the others":
                time.sleep(1)
                raise ValueError("only on this rank")
