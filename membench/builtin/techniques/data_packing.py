"""Training data in fewer bits, in mapped or columnar files, and with padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from membench.builtin.models.no_model import NoModel
from membench.builtin.techniques.data import DataTechnique, Stream
from membench.builtin.techniques.data_compression import Compression
from membench.data.columnar import ArrowFormat, ParquetFormat
from membench.data.layouts import Bits, Integers, too_many
from membench.plugins import Context, Model, Setting, Technique
from membench.plugins.storage import Format, Storage


class _Partner(DataTechnique):
    """One that does not go with every other."""

    def clash(self, other: Technique) -> str | None:
        """Why it does not go with another member of the stack, before it or after it; ``None`` where it does."""
        return None

    def refuse(self, setting: Setting) -> str | None:
        reasons = (self.clash(other) for other in (*setting.before, *setting.after))
        return super().refuse(setting) or next(filter(None, reasons), None)


class _Layout(_Partner):
    """How a token id is written."""

    bits: ClassVar[int]
    """Of a token id, at most."""

    def check(self, setting: Setting) -> str | None:
        vocabulary = _vocabulary(setting.model)
        return None if vocabulary is None else too_many(vocabulary, self.bits)

    def clash(self, other: Technique) -> str | None:
        return "token ids are written in one way, and the stack names two" if isinstance(other, _Layout) else None


class _Integers(_Layout):
    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, layout=Integers(f"uint{self.bits}"))


class Uint8(_Integers):
    """Token ids as bytes, for vocabularies of up to 256: an eighth of the 64 bits that torch wants them in.

    Batches come as narrow; a training widens each to 64 bits when it takes it.
    """

    bits = 8


class Uint16(_Integers):
    """Token ids in 16 bits, for vocabularies of up to 65,536: a quarter of the 64 that torch wants them in.

    Batches come as narrow; a training widens each to 64 bits when it takes it.
    """

    bits = 16


class Uint32(_Integers):
    """Token ids in 32 bits: half of the 64 that torch wants them in.

    Batches come as narrow; a training widens each to 64 bits when it takes it.
    """

    bits = 32


class BitPacked(_Layout):
    """Token ids in ⌈log2 vocabulary⌉ bits, one after the other: 13 for a vocabulary of 8,192.

    Nothing is lost, and any row can be read without the others: each begins a byte. Ids are unpacked into the smallest
    whole integers, all at the start or, with ``stream``, as they are needed. It knows nothing of which ids are
    frequent: a codec on whole integers makes them smaller, and is slower to write.
    """

    bits = Bits.most_bits

    def clash(self, other: Technique) -> str | None:
        if isinstance(other, MappedTokens | _Columnar):
            return "bits are unpacked in memory; mapped and columnar files want whole integers, such as those of uint16"
        return super().clash(other)

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, layout=Bits())


class MappedTokens(_Partner):
    """Token ids read from a mapped file: rows are pages of it, which the kernel reads when they are touched.

    numpy.memmap over the file of integers. Pages of a file are not live memory: the kernel drops them when something
    else wants the room. They do count in the footprint. Live are the blocks that batches are drawn from.
    """

    def clash(self, other: Technique) -> str | None:
        if isinstance(other, Compression):
            return "a mapped file is read as it lies, and a codec's frames have to be decompressed"
        if isinstance(other, Stream):
            return "a mapped file has nothing to decode, and stream decodes a few blocks at a time"
        return None

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, reading="mapped")


class _Columnar(_Partner):
    """Keeps rows in files of Apache Arrow, as integers of the stack's width; 64 bits where it names none."""

    needs: ClassVar[Mapping[str, str]] = {"pyarrow": "membench[data]"}

    def clash(self, other: Technique) -> str | None:
        if isinstance(other, _Columnar):
            return "data are kept in one format, and the stack names two"
        if isinstance(other, Compression):
            return "a codec compresses membench's own shards; columnar files compress by themselves or not at all"
        if isinstance(other, MappedTokens):
            return "mapped-tokens maps membench's own shards; arrow files are mapped as they are, parquet's cannot be"
        return None

    def format(self) -> Format:
        raise NotImplementedError

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, format=self.format())


class Parquet(_Columnar):
    """Rows of token ids in a Parquet file: a column of lists, a row group for each frame (pyarrow).

    Integers are encoded plainly: a dictionary of ids that are numbers already makes text larger. Parquet has no
    integers below 32 bits: ``uint8`` and ``uint16`` are kept in 32, for the codec to shrink. Read whole, or with
    ``stream`` a row group at a time; pages have checksums.

    Attributes:
        compression: of each page.
    """

    compression: Literal["none", "snappy", "zstd"] = "snappy"

    def format(self) -> Format:
        return ParquetFormat(self.compression)


class Arrow(_Columnar):
    """Rows of token ids in an Arrow IPC file, mapped when it is read: what ``datasets`` keeps (pyarrow).

    A record batch for each frame, uncompressed: a column of lists of fixed size, whose integers lie in the file as they
    do in memory. Pages of the file are not live memory, as with ``mapped-tokens``.
    """

    def clash(self, other: Technique) -> str | None:
        if isinstance(other, Stream):
            return "an arrow file is mapped and has nothing to decode, and stream decodes a few blocks at a time"
        return super().clash(other)

    def format(self) -> Format:
        return ArrowFormat()

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(super().data_storage(storage, context), reading="mapped")


class PadDocuments(DataTechnique):
    """Each document in rows of its own, the last filled up with padding, instead of one document after the other.

    What packing sequences saves, seen from the other side: the share of padding is disk, memory and time for nothing,
    and it grows the shorter documents are against rows. Padding is id 0, as any other to whoever reads.
    """

    def refuse(self, setting: Setting) -> str | None:
        if (reason := super().refuse(setting)) is not None:
            return reason
        if setting.workload.trains:
            return "the training loss has no mask for padding: it would be learnt; use read-data"
        return None

    def data_storage(self, storage: Storage, context: Context) -> Storage:
        return dataclasses.replace(storage, padded=True)


def _vocabulary(model: Model) -> int | None:
    """Token ids of a model, where they are known without building it."""
    if isinstance(model, NoModel):
        return model.vocabulary_size
    return model.shape.vocabulary if model.shape else None
