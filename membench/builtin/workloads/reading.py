"""Options of workloads that read a corpus."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from membench.data import sources
from membench.plugins import ByteCount, Corpus, Workload

Size = Annotated[ByteCount, Field(ge=1024)]
"""Bytes of text, as a number or as '8 MiB'."""


class ReadsCorpus(Workload):
    """Reads rows of a corpus in shuffled batches."""

    data: str | None = None
    """``topics`` (Python's help on itself), ``library`` (the source of Python's own library), or a folder of text,
    Parquet or what ``datasets`` saved."""
    data_size: Size | None = None
    """How much of the text at most: '8 MiB'."""
    workers: int = Field(default=0, ge=0, le=64)
    """Processes of torch's DataLoader that read."""
    batch_size: int
    sequence_length: int

    def check(self) -> str | None:
        if self.data is None:
            given = [name for name in ("data_size", "workers") if name in self.model_fields_set]
            return f"{given[0]} has no meaning without data" if given else None
        wrong = sources.problem(self.data)
        return f"data = {wrong}" if wrong else None

    def longest_sequence(self) -> int:
        return self.sequence_length

    def corpus(self) -> Corpus | None:
        if self.data is None:
            return None
        return Corpus(self.data, self.data_size, self.sequence_length, self.batch_size, self.workers)
