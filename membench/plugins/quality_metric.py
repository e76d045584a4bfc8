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
        pieces: runs of token ids, the first of each given and the others to be predicted.
        logits: of token ids (T,), int64, on the case's device: logits (T, vocabulary), as the workload has the module
            read them, with the stack's contexts around it.
        reference: of a piece, by its number: the reference's logits of all tokens but the last (T - 1, vocabulary),
            fp32, on the case's device; raises ``Unsuitable`` where they are not kept.
    """

    pieces: Sequence[Sequence[int]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    reference: Callable[[int], torch.Tensor]


class QualityMetric(Options):
    """A figure of how good the converted model is, taken in the phase ``evaluate``."""

    required: ClassVar[frozenset[str]] = frozenset({"measure"})
    unit: ClassVar[str] = ""
    """What follows the number: '%', 'nats'."""
    better: ClassVar[Literal["lower", "higher"]] = "lower"

    def measure(self, module: nn.Module, held_out: HeldOut, context: Context) -> float:
        """The figure of a module that is in its mode of evaluation, without gradients; leave the module as it is.

        Raises:
            Unsuitable: where it cannot be had of this case; the reason stands in the record.
        """
        raise NotImplementedError
