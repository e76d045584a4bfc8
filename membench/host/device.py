"""Devices as people write them: ``cpu``, ``cuda``, ``cuda:1``, and ``2xcpu`` for one process on each of two."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MOST_RANKS = 9999
_MOST_ON_CORES = 64
"""Each rank is a process of this machine, with a library of some hundred MiB to itself."""

_WRITTEN = re.compile(r"(?:(?P<count>[1-9][0-9]{0,3})x)?(?P<kind>cpu|cuda)(?::(?P<index>0|[1-9][0-9]{0,2}))?")


@dataclass(frozen=True)
class Device:
    """Where a job runs.

    Attributes:
        index: of the GPU among those that CUDA shows; ``None`` where the name leaves it open.
        count: how many devices of the kind, with one process (rank) on each.
        in_ranks: whether it was written with a count, so that techniques may spread a case over its ranks, even if
            there is only one (``1xcuda``).
    """

    kind: Literal["cpu", "cuda"]
    index: int | None = None
    count: int = 1
    in_ranks: bool = False

    @classmethod
    def parse(cls, text: str) -> Device:
        """The device that a text names.

        Raises:
            ValueError: if it names none.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None or ((found["kind"] == "cpu" or found["count"]) and found["index"]):
            raise ValueError("write cpu, cuda, cuda:0 or 2xcpu")
        if found["kind"] == "cpu" and int(found["count"] or 1) > _MOST_ON_CORES:
            raise ValueError(f"at most {_MOST_ON_CORES} ranks run on the cores of one machine: {_MOST_ON_CORES}xcpu")
        index = found["index"]
        kind: Literal["cpu", "cuda"] = "cpu" if found["kind"] == "cpu" else "cuda"
        return cls(kind, None if index is None else int(index), int(found["count"] or 1), found["count"] is not None)

    def __str__(self) -> str:
        """As people write it."""
        many = f"{self.count}x" if self.in_ranks else ""
        return f"{many}{self.kind}" + ("" if self.index is None else f":{self.index}")

    @property
    def single(self) -> Device:
        """The device without a count: where the reference of a case in ranks runs."""
        return Device(self.kind) if self.in_ranks else self

    def on_ranks(self, count: int) -> Device:
        """The device with a count: one process on each of so many.

        Raises:
            ValueError: if it has a count already, or is one GPU of several.
        """
        if self.in_ranks or self.index is not None:
            raise ValueError("write cpu or cuda where a number of ranks is given beside it")
        return Device(self.kind, None, count, True)

    @property
    def shares_cores(self) -> bool:
        """Whether its ranks are on the cores of one machine, so that their times are not those of several machines."""
        return self.kind == "cpu" and self.count > 1

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def ranks(self) -> tuple[Device, ...]:
        """The device of each rank; a job that is not in ranks keeps the name that was written."""
        if not self.in_ranks:
            return (self,)
        return tuple(Device(self.kind, rank if self.on_gpu else None) for rank in range(self.count))
