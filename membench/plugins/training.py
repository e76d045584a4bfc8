"""Training as the contract passes it: the data that is read, and the pieces of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from membench.plugins.storage import Extent

if TYPE_CHECKING:
    import torch
    from torch import nn

Step: TypeAlias = "Callable[[], torch.Tensor | None]"
"""Does one step; a training step returns its loss (a scalar, detached)."""

Tokens: TypeAlias = "Callable[[int], torch.Tensor]"
"""Returns the next token ids of the text, as many as asked for: (count,), int64, on the CPU."""


@dataclass
class TrainingStep:
    """The pieces of a training step, each replaceable by a technique.

    Attributes:
        split: of a step's batch of token ids (B, T): the runs of its rows that forward and backward go through one
            after the other, their gradients adding up.
        loss: of (module, such rows): the mean cross entropy of their next tokens, a scalar.
        backward: of the loss, weighted by the rows' share of the batch.
        part: the name of the part of the step that ``loss`` is. A technique whose loss goes backward, too, renames it;
            ``backward`` is then not called.
        has_loss: whether what ``loss`` returns is the batch's, or this rank's share of it. Of a pipeline's ranks only
            the last one has it.
        wrap: of a loss that runs the module piece by piece, as a pipeline's schedule does: takes what wraps the module
            for the backward pass, and runs that in place of it.
    """

    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None]
    step: Callable[[], None]
    zero_grad: Callable[[], None]
    part: str = "forward"
    has_loss: bool = True
    wrap: Callable[[nn.Module], None] | None = None


class Corpus(NamedTuple):
    """Training data that a workload reads: the source, how much of it, and in what rows, batches and processes."""

    source: str
    most_bytes: int | None
    length: int
    batch_size: int
    workers: int


class TrainingData(Protocol):
    """The training text of a case, as its stack stores it."""

    @property
    def extent(self) -> Extent: ...

    def tokens(self) -> int:
        """Count the tokens of an epoch, without padding."""

    def packed_bytes(self) -> int:
        """Count the bytes of all rows before they are compressed."""

    def codec_speeds(self) -> list[float]:
        """Measure how many MB a second the codec alone decompresses; an empty list without a codec."""

    def timed_afresh(self, earlier_speeds: list[float]) -> dict[str, tuple[float, str]]:
        """Measure how long opening takes and how fast the codec is, each with how it was obtained."""

    def opened(self) -> Any:
        """Open the data for ``batches``; all rows are decoded now if they are read whole."""

    def batches(self, size: int, seed: int, epoch: int, opened: Any, share: tuple[int, int] = (0, 1)) -> Iterator[Any]:
        """Yield the batches of an epoch, (size, tokens); the last one has the rows that are left.

        Args:
            opened: what the method of that name returned.
            share: (number, count) of this reader among those that share the epoch.
        """


class Samples(Protocol):
    """Labelled samples, the source of a classifier's batches.

    A batch is one tensor (samples, features + 1), float32: features between 0 and 1, and the class in the last column.
    """

    @property
    def width(self) -> int:
        """Features of a sample."""

    @property
    def classes(self) -> int: ...

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that has to be kept for drawing samples."""

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield batches without end."""
