"""Rows of token ids as column ``input_ids`` of Parquet and Arrow files, as tools for training data write them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from membench.data import index
from membench.data.arrow import pyarrow
from membench.data.layouts import Integers
from membench.data.partial import whole_or_not_at_all
from membench.plugins.storage import Buffer, Damaged, Extent, Read, Storage

if TYPE_CHECKING:
    from membench.plugins.storage import Ids

COLUMN = "input_ids"
_PARQUET, _ARROW = "rows.parquet", "rows.arrow"
_PARQUET_MAGIC, _ARROW_MAGIC = b"PAR1", b"ARROW1\0\0"
"""What such a file begins with."""


@dataclass(frozen=True)
class ParquetFormat:
    """One file; a frame is a row group, plainly encoded, and every page has its checksum."""

    compression: Literal["none", "snappy", "zstd"]

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        arrow, schema = pyarrow(), _schema(extent, storage)
        with whole_or_not_at_all(folder) as partial:
            ends = []
            with (
                (partial / _PARQUET).open("wb") as file,
                arrow.parquet.ParquetWriter(
                    file, schema, compression=self.compression, use_dictionary=False,
                    write_statistics=False, write_page_checksum=True,
                ) as writer,
            ):  # fmt: skip
                for rows in frames:
                    batch = _batch(_narrowed(rows, extent, storage), schema)
                    writer.write_table(arrow.Table.from_batches([batch]), row_group_size=len(rows))
                    ends.append(file.tell())
            _write_index(partial / _PARQUET, len(_PARQUET_MAGIC), ends, extent, storage)

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Read:
        arrow, path = pyarrow(), folder / _PARQUET
        entries = index.read(folder, extent, storage, lambda number: _PARQUET)
        parquet = index.OpenFile(path)
        with _told_as_damage(path):
            metadata = arrow.parquet.read_metadata(path)

        def one(number: int, entry: index.Entry, stored: Buffer) -> Ids:
            with (
                _told_as_damage(f"{path}, offset {entry.offset}"),
                # Opened each time: a reader of pyarrow is not to be shared by threads or processes.
                arrow.parquet.ParquetFile(_Part(stored, entry.offset), metadata=metadata, pre_buffer=False) as file,
            ):
                table = file.read_row_group(number, use_threads=False)
            return _rows(table.column(0).combine_chunks())

        def read(numbers: range) -> Ids:
            run = entries[numbers.start : numbers.stop]
            return _joined(
                [one(*each) for each in zip(numbers, run, index.frames_of(parquet.bytes_of(run), run), strict=True)]
            )

        return read


class _Part(io.BytesIO):
    """A file of which only the bytes from an offset on are there: what is read is what the checksum was taken of."""

    def __init__(self, stored: Buffer, offset: int) -> None:
        super().__init__(stored)
        self._offset = offset

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(place - self._offset if whence == os.SEEK_SET else place, whence) + self._offset

    def tell(self) -> int:
        return super().tell() + self._offset


@dataclass(frozen=True)
class ArrowFormat:
    """One IPC file, mapped when it is read; a frame is a record batch."""

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        arrow, schema = pyarrow(), _schema(extent, storage)
        with whole_or_not_at_all(folder) as partial:
            ends = []
            with (partial / _ARROW).open("wb") as file, arrow.ipc.new_file(file, schema) as writer:
                for rows in frames:
                    writer.write_batch(_batch(_narrowed(rows, extent, storage), schema))
                    ends.append(file.tell())
            _write_index(partial / _ARROW, len(_ARROW_MAGIC) + schema.serialize().size, ends, extent, storage)

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Read:
        arrow, path = pyarrow(), folder / _ARROW
        entries = index.read(folder, extent, storage, lambda number: _ARROW)
        with _told_as_damage(path):
            mapped = arrow.memory_map(str(path)).read_buffer()
            reader = arrow.ipc.open_file(mapped)

        def one(number: int, entry: index.Entry) -> Ids:
            with _told_as_damage(f"{path}, offset {entry.offset}"):
                return _rows(reader.get_batch(number).column(0))

        def read(numbers: range) -> Ids:
            run = entries[numbers.start : numbers.stop]
            # Before it is parsed: a flipped bit in its header can make the library abort the process.
            index.frames_of(memoryview(mapped)[run[0].offset : run[-1].end], run)
            return _joined([one(number, entry) for number, entry in zip(numbers, run, strict=True)])

        return read


def _write_index(path: Path, head_bytes: int, ends: list[int], extent: Extent, storage: Storage) -> None:
    """Write the index of a file that has its frames between a head and a foot."""
    with path.open("rb") as file:
        head = file.read(head_bytes)
        stored = (file.read(end - file.tell()) for end in ends)
        frames = [index.Kept(len(frame), index.checksum(frame)) for frame in stored]
        index.write(path.parent, extent, storage, frames, (head, file.read()))


@contextmanager
def _told_as_damage(where: str | Path) -> Iterator[None]:
    """Raise ``Damaged`` for whatever the library says of its file."""
    try:
        yield
    except (pyarrow().ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise Damaged(f"{where}: {first}") from None


def _schema(extent: Extent, storage: Storage) -> Any:
    import numpy

    arrow = pyarrow()
    token = arrow.field("element", arrow.from_numpy_dtype(numpy.dtype(storage.layout.name)), nullable=False)
    return arrow.schema([arrow.field(COLUMN, arrow.list_(token, extent.length), nullable=False)])


def _narrowed(rows: Ids, extent: Extent, storage: Storage) -> Ids:
    assert isinstance(storage.layout, Integers)
    return storage.layout.narrowed(rows, extent)


def _batch(rows: Ids, schema: Any) -> Any:
    arrow = pyarrow()
    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), type=schema.field(0).type)
    return arrow.record_batch([lists], schema=schema)


def _joined(frames: list[Ids]) -> Ids:
    import numpy

    return frames[0] if len(frames) == 1 else numpy.concatenate(frames)


def _rows(lists: Any) -> Ids:
    rows: Ids = lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), -1)
    return rows
