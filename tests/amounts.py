"""Techniques, models and workloads of known amounts, and some that end badly. Registered by the tests alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from membench.plugins import Context, Model, Step, Technique, Tokens, Workload

if TYPE_CHECKING:
    from torch import nn

MIB = 2**20


class Block(Model):
    """A module of one tensor of known size."""

    gives_logits: ClassVar[bool] = False
    mib: int = 64

    def build(self, context: Context) -> nn.Module:
        import torch

        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.ones(self.mib * MIB // 4))
        return module

    def vocabulary(self, module: nn.Module) -> int:
        return 256


class TooLarge(Block):
    """A module that no machine holds."""

    def needed_bytes(self) -> int | None:
        return 2**60


class Burst(Workload):
    """Allocates a known amount for a moment."""

    mib: int = 300

    def longest_sequence(self) -> int:
        return 1

    def tokens_per_step(self) -> int:
        return 1

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        def step() -> None:
            torch.ones(self.mib * MIB // 4)

        return step


class Apart(Workload):
    """Takes 200 MiB and gives them back; only then a child holds 64 MiB for a while."""

    def longest_sequence(self) -> int:
        return 1

    def tokens_per_step(self) -> int:
        return 1

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        import torch

        def step() -> None:
            torch.ones(200 * MIB // 4)
            child = os.fork()
            if child == 0:
                held = bytearray(b"\1") * (64 * MIB)
                time.sleep(0.3)
                del held
                os._exit(0)
            os.waitpid(child, 0)

        return step


class Ends(Technique):
    """Ends its process in the way it is told to."""

    how: Literal["kill", "segfault", "raise", "hang", "print", "grow", "nothing", "overflow", "rewrite"]
    note: str = ""

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        match self.how:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                raise ValueError("a technique that gives up")
            case "hang":
                child = os.fork()
                if self.note:
                    Path(self.note).with_suffix(".child" if child == 0 else ".worker").write_text(str(os.getpid()))
                time.sleep(600)
            case "print":
                sys.stdout.write("x" * 8 * MIB)
            case "grow":
                import resource

                import torch

                resource.setrlimit(resource.RLIMIT_DATA, (1536 * MIB, 1536 * MIB))
                kept = []
                while True:
                    kept.append(torch.ones(64 * MIB // 4))
            case "overflow":
                for parameter in module.parameters():
                    parameter.data.fill_(float("inf"))
            case "rewrite":  # of all ways the one that raises no tensor's version
                for parameter in module.parameters():
                    parameter.data[..., 1:] = 0
            case "nothing":
                pass
        return module
