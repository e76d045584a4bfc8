"""Where training text comes from: Python's own, or files of a folder, as documents."""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from membench.data import corpus
from membench.data.arrow import pyarrow
from membench.errors import summary
from membench.host.environment import available_bytes
from membench.host.out_of_memory import is_out_of_memory
from membench.plugins import DoesNotFit, Unsuitable
from membench.plugins.storage import Damaged
from membench.units import format_bytes

BUILT_IN = ("topics", "library")
_TEXT = (".txt", ".md", ".py", ".json", ".jsonl", ".html", ".csv")
_COLUMN = "text"
_LEAST_COPIES = 2
"""Text is kept beside its token ids, which are of four bytes each and for a time there twice."""
_MOST_ROWS, _MOST_BYTES = 1024, 2**29
"""Of Parquet, decoded at once."""


def problem(source: str) -> str | None:
    """What is wrong with a source, as far as it can be told without opening a file."""
    if source in BUILT_IN:
        return None
    try:
        folder = Path(source).expanduser()
        if not source or not folder.is_dir():
            return f"'{source}' is neither {' nor '.join(BUILT_IN)}, nor a folder here"
        if parts := sorted(path.name for path in folder.iterdir() if _is_dataset(path)):
            return f"'{source}' holds what datasets saved; name the folder of one: {', '.join(parts)}"
        if not _is_dataset(folder) and not any(_found(folder)):
            return f"'{source}': there is no text in that folder ({', '.join(_TEXT)} or .parquet)"
    except (RuntimeError, OSError, ValueError) as error:  # ~ of nobody, too long a name, a zero byte, no permission
        return f"'{source[:80]}': {error}"
    return None


@functools.cache
def documents(source: str, most_bytes: int | None) -> Sequence[bytes]:
    """Documents in a fixed order, cut where there are so many bytes.

    ``topics``: the paragraphs of Python's help on its own language that are not held out. ``library``: the source files
    of Python's own library. Else a folder: each text file is a document, each row of the column ``text`` of a Parquet
    file or of what ``datasets`` saved. Links to files are followed, those to folders are not. No more of a file is read
    than is wanted.

    Raises:
        Unsuitable: if there is no text, or what reads it is not installed.
        Damaged: if a file is no Parquet, or not what ``datasets`` saved.
        DoesNotFit: if it is more than memory can hold.
        OSError: if a file cannot be read; it names it.
    """
    free_bytes = available_bytes()
    if most_bytes is None or _LEAST_COPIES * most_bytes > free_bytes:
        text_bytes = _text_bytes(source)
        _refuse_what_does_not_fit(source, min(text_bytes, most_bytes or text_bytes), free_bytes)
    found: list[bytes] = []
    read_bytes = 0
    for file in _all(source):
        with file:
            document = file.read(-1 if most_bytes is None else most_bytes - read_bytes)
        if not document:
            continue
        found.append(document)
        read_bytes += len(document)
        _refuse_what_does_not_fit(source, read_bytes, free_bytes)  # a file may hold more than it said
        if read_bytes == most_bytes:
            break
    if not found:
        raise Unsuitable(f"there is no text in {source}: all of it is empty")
    return found


@functools.cache
def digest(source: str, most_bytes: int | None) -> str:
    """A hash of the documents: figures that were had from two different texts do not go together."""
    found = hashlib.sha256()
    for document in documents(source, most_bytes):
        found.update(len(document).to_bytes(8, "little"))
        found.update(document)
    return found.hexdigest()[:16]


def _refuse_what_does_not_fit(source: str, text_bytes: int, free_bytes: int) -> None:
    if _LEAST_COPIES * text_bytes > free_bytes:
        raise DoesNotFit(
            f"{source}: {format_bytes(text_bytes)} of text or more, and its token ids want as much again; "
            f"{format_bytes(free_bytes)} are available on this machine: set data_size to take less of it"
        )


def _text_bytes(source: str) -> int:
    """How much text there is at least, as far as it can be told without reading it."""
    folder = Path(source).expanduser()
    if source in BUILT_IN or _is_dataset(folder):
        return 0
    return sum(_column_bytes(path) if path.suffix == ".parquet" else path.stat().st_size for path in _files(folder))


def _all(source: str) -> Iterator[BinaryIO]:
    """The documents, to be read and closed one after the other."""
    if source == "topics":
        # Each with the blank line after it, which held-out text has too: what has never seen one pays for all of them.
        yield from (io.BytesIO(paragraph + b"\n\n") for paragraph in corpus.split()[0].split(b"\n\n"))
        return
    if source == "library":
        yield from (path.open("rb") for path in sorted(_library()))
        return
    folder = Path(source).expanduser()
    if _is_dataset(folder):
        yield from _saved_by_datasets(folder)
        return
    for path in _files(folder):
        if path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield path.open("rb")


def _library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        # In pydoc_data lies the help text, with all that is held out.
        folders[:] = [name for name in folders if name not in ("site-packages", "pydoc_data")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _saved_by_datasets(folder: Path) -> Iterator[BinaryIO]:
    with _said_if_missing(folder, "datasets"):
        pyarrow()  # before datasets imports it
        datasets = importlib.import_module("datasets")
    for path in folder.iterdir():
        if not path.is_file() and not path.is_dir():
            raise Damaged(f"{path}: neither a file nor a folder")  # opening a pipe would wait for ever
    with _told_as_damage(folder):
        data = datasets.load_from_disk(str(folder))
    _refuse_without_text({name: str(getattr(kind, "dtype", kind)) for name, kind in data.features.items()}, folder)
    with _told_as_damage(folder):
        for rows in data.select_columns(_COLUMN).with_format("arrow").iter(batch_size=1000):
            yield from _texts(rows.column(0))


@contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    with _said_if_missing(path, "data"):
        arrow = pyarrow()
    # Opened here, and read a buffer at a time: pyarrow takes no names that are not UTF-8, and reads columns whole.
    with path.open("rb") as stored, _told_as_damage(path):
        yield arrow.parquet.ParquetFile(stored, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)


def _parquet(path: Path) -> Iterator[BinaryIO]:
    with _opened_parquet(path) as file:
        _refuse_without_text({field.name: str(field.type) for field in file.schema_arrow}, path)
        groups = list(map(file.metadata.row_group, range(file.num_row_groups)))
        if sum(group.num_rows for group in groups) != file.metadata.num_rows:
            raise Damaged(f"{path}: its row groups have other than the {file.metadata.num_rows} rows that it says")
        for number, group in enumerate(groups):
            # A page that holds a document once, to be repeated, may be tiny: each row may be as large as the column.
            most_rows = _MOST_BYTES // max(1, _column_bytes_of(group))
            batches = file.iter_batches(
                max(1, min(most_rows, _MOST_ROWS)), row_groups=[number], columns=[_COLUMN], use_threads=False
            )
            left = group.num_rows
            for batch in batches:
                yield from _texts(batch.column(0))
                left -= len(batch)
            if left:
                raise Damaged(f"{path}, row group {number}: {left} of its {group.num_rows} rows are missing")


def _column_bytes(path: Path) -> int:
    with _opened_parquet(path) as file:
        return sum(_column_bytes_of(file.metadata.row_group(number)) for number in range(file.num_row_groups))


def _column_bytes_of(group: Any) -> int:
    """What the text of a row group says that its pages take, decompressed."""
    columns = map(group.column, range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == _COLUMN)


def _texts(column: Any) -> Iterator[BinaryIO]:
    """Rows that are not null, as the bytes that they are: as text they would have to be UTF-8."""
    rows = column.cast(pyarrow().large_binary())
    rows.validate(full=True)  # else a damaged offset leads anywhere in memory
    return (io.BytesIO(row.as_py()) for row in rows if row.is_valid)


@contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    """Raise ``Damaged`` for whatever libraries say of what they read, which is of any type."""
    try:
        yield
    except (Unsuitable, Damaged):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Damaged(f"{path}: {summary(error)}") from None


@contextmanager
def _said_if_missing(wanting: Path, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unsuitable(
            f"reading {wanting} needs '{error.name}', which is not installed: pip install 'membench[{extra}]'"
        ) from None


def _refuse_without_text(columns: dict[str, str], where: Path) -> None:
    if _COLUMN not in columns:
        raise Unsuitable(f"{where} has no column '{_COLUMN}', but {', '.join(map(repr, columns))}")
    if columns[_COLUMN] not in ("string", "large_string", "string_view"):
        raise Unsuitable(f"{where}: column '{_COLUMN}' holds {columns[_COLUMN]}; expected text")


def _is_dataset(folder: Path) -> bool:
    """Whether a folder is what ``datasets`` saved."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _files(folder: Path) -> Iterator[Path]:
    """Files of text in a folder and those below it, by name, each part of it by itself."""
    return map(Path, sorted(_found(folder), key=lambda path: path.split(os.sep)))


def _found(folder: Path) -> Iterator[str]:
    """Files of text, in any order; pipes and devices are left out, they may have no end.

    Raises:
        OSError: if a folder cannot be read, or a link leads nowhere; it names it.
    """
    for place, _, names in os.walk(folder, onerror=_raised):
        for name in names:
            path = os.path.join(place, name)
            if os.path.splitext(name)[1] in (*_TEXT, ".parquet") and stat.S_ISREG(os.stat(path).st_mode):
                yield path


def _raised(error: OSError) -> None:
    raise error
