"""Anybody's module, from a function."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pydantic import Field

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class Factory(Model):
    """Any nn.Module that 'package.module:function' returns; it takes token ids and gives logits.

    The function is called without arguments after torch's seed is set, in the folder the run was started in.
    """

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    vocabulary_size: int = Field(256, ge=2)

    def build(self, context: Context) -> nn.Module:
        import torch

        torch.manual_seed(context.seed)
        return self._make().to(context.device)

    def skeleton(self) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self._make()

    def needed_bytes(self) -> int | None:
        try:
            return sum(parameter.nbytes for parameter in self.skeleton().parameters())
        except Exception:  # a function that cannot be run on shapes alone
            return None

    def _make(self) -> nn.Module:
        where, _, name = self.function.partition(":")
        module: nn.Module = getattr(importlib.import_module(where), name)()
        return module

    def vocabulary(self, module: nn.Module) -> int:
        return self.vocabulary_size
