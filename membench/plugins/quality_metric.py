"""The base class of quality metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from membench.plugins.contract import Context
from membench.plugins.options import Options

if TYPE_CHECKING:
    import torch
    from torch import nn


class HeldOut(NamedTuple):
    """Text that the model was not trained on.

    Attributes:
        pieces: runs of token ids; the first of each is given, the others are predicted.
        logits: maps token ids (T,), int64, on the case's device, to logits (T, vocabulary), computed as the workload
            runs the module, inside the stack's step contexts.
        reference: maps the number of a piece to the reference's logits of all tokens but the last (T - 1, vocabulary),
            fp32, on the case's device; raises ``Unsuitable`` if they were not kept.
    """

    pieces: Sequence[Sequence[int]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    reference: Callable[[int], torch.Tensor]


class QualityMetric(Options):
    """A measure of the converted model's quality, taken in the phase ``evaluate``."""

    required: ClassVar[frozenset[str]] = frozenset({"measure"})
    unit: ClassVar[str] = ""
    """The unit that is printed after the number: '%', 'nats'."""
    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        """Measure a module that is in evaluation mode, without gradients; do not change the module.

        Raises:
            Unsuitable: if this case has no such value; the reason is kept in the record.
        """
        raise NotImplementedError
