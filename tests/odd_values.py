"""A technique and a workload that report odd values. Registered by the tests alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from membench.plugins import Context, Step, Technique, Tokens, Workload

if TYPE_CHECKING:
    from torch import nn


def _odd(name: str) -> Any:
    import numpy
    import torch

    return {
        "nan": float("nan"), "infinite": float("inf"), "huge": 10**400, "endless": 10**5000, "bool": True, "text": "3",
        "list": [3], "negative": -3, "complex": 1j, "bytes": b"3", "numpy-bool": numpy.bool_(True),
        "numpy-nan": numpy.float32("nan"), "array": numpy.ones(2), "tensor": torch.tensor(3), "object": object(),
        "numpy-int": numpy.int64(3), "numpy-float": numpy.float32(3), "good": 3,
    }[name]  # fmt: skip


class Reports(Workload):
    """Reports an odd value where it is told to."""

    tokens: str = "good"
    decoded: str = "good"
    loss: str = ""

    def longest_sequence(self) -> int:
        return 1

    def tokens_per_step(self) -> int | None:
        return _odd(self.tokens)  # type: ignore[no-any-return]

    def decoded_tokens_per_step(self) -> int | None:
        return _odd(self.decoded)  # type: ignore[no-any-return]

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        def step() -> Any:
            with context.part("decode"):
                sum(range(1000))
            return _odd(self.loss) if self.loss else None

        return step


class ReportsFact(Technique):
    """Reports an odd fact."""

    fact: str
    field: str = "accuracy_percent"
    source: str = "count"

    def apply(self, module: nn.Module, context: Context) -> nn.Module:
        source: Any = self.source if self.source != "none" else None
        context.facts.update({self.field: (_odd(self.fact), source)})
        return module
