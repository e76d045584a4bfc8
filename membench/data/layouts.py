"""Token ids as plain integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from membench.data.storage import Extent, Ids


@dataclass(frozen=True)
class Integers:
    """Little-endian integers of 1, 2, 4 or 8 bytes, as numpy names them: ``uint16``, ``int64``."""

    name: str

    @property
    def width_bytes(self) -> int:
        return int(self.name.lstrip("uint")) // 8

    def bytes_per_row(self, extent: Extent) -> int:
        return extent.length * self.width_bytes

    def pack(self, rows: Ids, extent: Extent) -> bytes:
        return rows.astype(f"<{self.name[0]}{self.width_bytes}", copy=False).tobytes()

    def unpack(self, raw: bytes | memoryview, extent: Extent) -> Ids:
        import numpy

        return numpy.frombuffer(raw, f"<{self.name[0]}{self.width_bytes}").reshape(-1, extent.length)
