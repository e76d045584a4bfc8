"""Rows of token ids as column ``input_ids`` of Parquet and Arrow files, as tools for training data write them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from membench.data.arrow import pyarrow
from membench.data.layouts import Integers
from membench.data.partial import whole_or_not_at_all
from membench.data.storage import Damaged, Extent, Frame, Storage

if TYPE_CHECKING:
    from membench.data.storage import Ids

COLUMN = "input_ids"
_CRC32 = b"crc32"


@dataclass(frozen=True)
class ParquetFormat:
    """One file; a frame is a row group, plainly encoded, and every page has its checksum."""

    compression: Literal["none", "snappy", "zstd"]

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        arrow, schema = pyarrow(), _schema(extent, storage)
        with (
            whole_or_not_at_all(folder) as partial,
            arrow.parquet.ParquetWriter(
                partial / "rows.parquet", schema, compression=self.compression, use_dictionary=False,
                write_statistics=False, write_page_checksum=True,
            ) as writer,
        ):  # fmt: skip
            for rows in frames:
                batch = _batch(_narrowed(rows, extent, storage), schema)
                writer.write_table(arrow.Table.from_batches([batch]), row_group_size=len(rows))

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Frame:
        arrow, path = pyarrow(), folder / "rows.parquet"
        try:
            metadata = arrow.parquet.read_metadata(path)
        except (arrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        _refuse_others(metadata.schema.to_arrow_schema(), extent, storage, path)
        if metadata.num_rows != extent.rows:
            raise Damaged(f"{path}: {metadata.num_rows} rows are here, and {extent.rows} are to be read")

        def frame(number: int) -> Ids:
            try:
                # Opened for each frame: a reader of pyarrow is not to be shared by threads or processes.
                with arrow.parquet.ParquetFile(
                    path, metadata=metadata, pre_buffer=False, page_checksum_verification=True
                ) as file:
                    table = file.read_row_group(number, use_threads=False)
            except (arrow.ArrowException, OSError) as error:
                offset = metadata.row_group(number).column(0).data_page_offset
                raise _damaged(f"{path}, offset {offset}", error) from None
            return _rows(table.column(0).combine_chunks())

        return frame


@dataclass(frozen=True)
class ArrowFormat:
    """One IPC file, mapped when it is read; a frame is a record batch, with its checksum as metadata of its own."""

    def write(self, frames: Iterable[Ids], extent: Extent, storage: Storage, folder: Path) -> None:
        arrow, schema = pyarrow(), _schema(extent, storage)
        with (
            whole_or_not_at_all(folder) as partial,
            arrow.ipc.new_file(str(partial / "rows.arrow"), schema) as writer,
        ):
            for rows in frames:
                narrowed = _narrowed(rows, extent, storage)
                writer.write_batch(_batch(narrowed, schema), custom_metadata={_CRC32: _checksum(narrowed)})

    def open(self, extent: Extent, storage: Storage, folder: Path) -> Frame:
        arrow, path = pyarrow(), folder / "rows.arrow"
        try:
            mapped = arrow.memory_map(str(path)).read_buffer()
            reader = arrow.ipc.open_file(mapped)
        except (arrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        _refuse_others(reader.schema, extent, storage, path)

        def frame(number: int) -> Ids:
            try:
                batch, metadata = reader.get_batch_with_custom_metadata(number)
            except (arrow.ArrowException, OSError) as error:
                raise _damaged(f"{path}, record batch {number}", error) from None
            rows = _rows(batch.column(0))
            if metadata is None or metadata[_CRC32] != _checksum(rows):
                offset = batch.column(0).flatten().buffers()[1].address - mapped.address
                raise Damaged(f"{path}, offset {offset}: the checksum of the record batch is not what was written")
            return rows

        return frame


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


def _rows(lists: Any) -> Ids:
    rows: Ids = lists.flatten().to_numpy(zero_copy_only=True).reshape(len(lists), -1)
    return rows


def _checksum(rows: Ids) -> bytes:
    return str(zlib.crc32(rows.data)).encode()


def _refuse_others(schema: Any, extent: Extent, storage: Storage, path: Path) -> None:
    """Raise ``Damaged`` if a file has other columns than are to be read."""
    wanted = _schema(extent, storage)
    if not schema.equals(wanted):
        raise Damaged(f"{path}: what is here is {_named(schema)}, and {_named(wanted)} is to be read")


def _named(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _damaged(where: str | Path, error: Exception) -> Damaged:
    first = str(error).partition("\n")[0]
    return Damaged(f"{where}: {first}")
