"""A model and a workload of known amounts, for the doctor: what is read of them can be compared with the truth."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from membench.plugins import Context, Model, Step, Technique, Tokens, Workload

if TYPE_CHECKING:
    from torch import nn

_MIB = 2**20


class Ballast(Model):
    """A module of one tensor of known size: touched, never touched, or mapped from a file."""

    gives_logits: ClassVar[bool] = False
    mib: int = Field(64, ge=1, le=1_048_576)
    kind: Literal["touched", "untouched", "mapped"] = "touched"

    def build(self, context: Context) -> nn.Module:
        import torch

        count = self.mib * _MIB // 4
        if self.kind == "touched":
            tensor = torch.ones(count, device=context.device)
        elif self.kind == "untouched":
            tensor = torch.empty(count, device=context.device)
        else:
            with tempfile.NamedTemporaryFile() as file:
                file.write(os.urandom(_MIB) * self.mib)
                file.flush()
                tensor = torch.from_file(file.name, size=count)
                tensor.view(torch.int32).max()  # reading maps every page
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(tensor, requires_grad=False)
        return module

    def vocabulary(self, module: nn.Module) -> int:
        return 256


class Burst(Workload):
    """Allocates and touches a known amount, in this process or in a child, holds it for a while and lets it go."""

    mib: int = Field(300, ge=0, le=1_048_576)
    hold_s: float = Field(0.001, ge=0, le=3600)
    in_child: bool = False

    def longest_sequence(self) -> int:
        return 1

    def tokens_per_step(self) -> int:
        return 1

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        def hold() -> None:
            held = torch.ones(self.mib * _MIB // 4, device=context.device)
            time.sleep(self.hold_s)
            del held

        def step() -> None:
            if not self.in_child:
                hold()
                return
            child = os.fork()
            if child == 0:
                # Plain Python: the parent's thread pool did not come along.
                held = bytearray(b"\1") * (self.mib * _MIB)
                time.sleep(self.hold_s)
                del held
                os._exit(0)
            os.waitpid(child, 0)

        return step
