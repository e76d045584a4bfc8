"""Reading training data, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from membench.builtin.workloads.reading import ReadsCorpus
from membench.data.epochs import epochs
from membench.plugins import Context, Step, Technique, Tokens

if TYPE_CHECKING:
    from torch import nn


class ReadData(ReadsCorpus):
    """An epoch of shuffled batches of token ids, read as a training loop reads them; the model only names the tokens.

    Phase ``store`` packs, compresses and writes the data, and reads them back once; a step is an epoch: all rows, the
    last batch with what is left. Files lie in the page cache: the time is that of decoding, not of a disk. Workers
    start anew with each epoch. Bytes that are no UTF-8 are kept by a vocabulary of bytes, and are U+FFFD to one of
    words.
    """

    data: str | None = "topics"
    batch_size: int = Field(32, ge=1, le=65_536)
    sequence_length: int = Field(256, ge=1, le=1_048_576)

    def tokens_per_step(self) -> int | None:
        return None

    def start(self, module: nn.Module, tokens: Tokens, techniques: Sequence[Technique], context: Context) -> Step:
        assert context.data is not None
        read = epochs(context.data, self.batch_size, context.seed, self.workers)
        numbers = itertools.count()

        def step() -> None:
            for batch in read(next(numbers)):
                batch.to(context.device)

        return step
