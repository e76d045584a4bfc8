"""Anybody's module, from a function."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pydantic import Field

from membench.plugins import Context, Model

if TYPE_CHECKING:
    from torch import nn


class Factory(Model):
    """Any nn.Module that 'package.module:function' returns; it takes token ids and gives logits."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    vocabulary_size: int = Field(256, ge=2)

    def build(self, context: Context) -> nn.Module:
        where, _, name = self.function.partition(":")
        return getattr(importlib.import_module(where), name)().to(context.device)

    def vocabulary(self, module: nn.Module) -> int:
        return self.vocabulary_size
