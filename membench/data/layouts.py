"""Token ids as plain integers, and as bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from membench.plugins import Unsuitable

if TYPE_CHECKING:
    from membench.plugins.storage import Buffer, Extent, Ids, Type


@dataclass(frozen=True)
class Integers:
    """Little-endian integers of 1, 2, 4 or 8 bytes, as numpy names them: ``uint16``, ``int64``."""

    name: str

    @property
    def width_bytes(self) -> int:
        return int(self.name.lstrip("uint")) // 8

    def type(self, extent: Extent) -> Type:
        import numpy

        return numpy.dtype(f"<{self.name[0]}{self.width_bytes}")

    def bytes_per_row(self, extent: Extent) -> int:
        return extent.length * self.width_bytes

    def narrowed(self, rows: Ids, extent: Extent) -> Ids:
        """The rows as such integers.

        Raises:
            Unsuitable: if the vocabulary has ids that do not fit.
        """
        wrong = too_many(extent.vocabulary, 8 * self.width_bytes)
        if wrong:
            raise Unsuitable(wrong)
        return rows.astype(self.type(extent), copy=False)

    def pack(self, rows: Ids, extent: Extent) -> bytes:
        return self.narrowed(rows, extent).tobytes()

    def unpack(self, raw: Buffer, extent: Extent) -> Ids:
        import numpy

        return numpy.frombuffer(raw, self.type(extent)).reshape(-1, extent.length)


@dataclass(frozen=True)
class Bits:
    """Token ids of ⌈log2 vocabulary⌉ bits each, one after the other from the lowest bit up; each row begins a byte.

    Eight ids are as many bytes as an id has bits, and the n-th of any eight lies at the same place in them.
    """

    name = "bits"
    most_bits = 24
    """What may begin inside a byte and still lies within 32 bits."""

    def bits(self, extent: Extent) -> int:
        return max(1, (extent.vocabulary - 1).bit_length())

    def type(self, extent: Extent) -> Type:
        import numpy

        return numpy.min_scalar_type(2 ** self.bits(extent) - 1)

    def bytes_per_row(self, extent: Extent) -> int:
        return -(-extent.length * self.bits(extent) // 8)

    def pack(self, rows: Ids, extent: Extent) -> bytes:
        import numpy

        wrong = too_many(extent.vocabulary, self.most_bits)
        if wrong:
            raise Unsuitable(wrong)
        bits, eights = self.bits(extent), -(-extent.length // 8)
        ids = numpy.zeros((len(rows), eights * 8), numpy.uint32)
        ids[:, : extent.length] = rows
        packed = numpy.zeros((len(rows), eights, bits), numpy.uint8)
        for place in range(8):
            first, shift = divmod(place * bits, 8)
            shifted = ids[:, place::8] << shift
            for byte in range(-(-(shift + bits) // 8)):
                packed[:, :, first + byte] |= (shifted >> 8 * byte).astype(numpy.uint8)
        return packed.reshape(len(rows), -1)[:, : self.bytes_per_row(extent)].tobytes()

    def unpack(self, raw: Buffer, extent: Extent) -> Ids:
        import numpy

        bits, eights = self.bits(extent), -(-extent.length // 8)
        stored = numpy.frombuffer(raw, numpy.uint8).reshape(-1, self.bytes_per_row(extent))
        filled = numpy.zeros((len(stored), eights * bits), numpy.uint8)
        filled[:, : stored.shape[1]] = stored
        packed = filled.reshape(len(stored), eights, bits)
        ids = numpy.empty((len(stored), eights * 8), self.type(extent))
        for place in range(8):
            first, shift = divmod(place * bits, 8)
            shifted = numpy.zeros((len(stored), eights), numpy.uint32)
            for byte in range(-(-(shift + bits) // 8)):
                shifted |= packed[:, :, first + byte].astype(numpy.uint32) << 8 * byte
            ids[:, place::8] = (shifted >> shift) & (2**bits - 1)
        return ids[:, : extent.length]


def too_many(vocabulary: int, bits: int) -> str | None:
    """Why ids of so many bits do not do for a vocabulary, or ``None``."""
    if vocabulary <= 2**bits:
        return None
    return f"{bits} bits tell {2**bits:,} token ids apart, and the vocabulary has {vocabulary:,}"
