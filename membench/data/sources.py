"""Where training text comes from: Python's own, or files of a folder, as documents."""

from __future__ import annotations

import functools
import importlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from membench import corpus
from membench.data.arrow import pyarrow
from membench.data.storage import Damaged
from membench.plugins import Unsuitable

BUILT_IN = ("topics", "library")
_TEXT = (".txt", ".md", ".py", ".json", ".jsonl", ".html", ".csv")
_COLUMN = "text"


def problem(source: str) -> str | None:
    """What is wrong with a source, as far as it can be told without opening a file."""
    if source in BUILT_IN:
        return None
    try:
        folder = Path(source).expanduser()
        is_folder = bool(source) and folder.is_dir()
    except (RuntimeError, OSError, ValueError) as error:  # ~ of nobody, too long a name, a zero byte
        return f"'{source[:80]}': {error}"
    if not is_folder:
        return f"'{source}' is neither {' nor '.join(BUILT_IN)}, nor a folder here"
    if parts := sorted(path.name for path in folder.iterdir() if _is_dataset(path)):
        return f"'{source}' holds what datasets saved; name the folder of one: {', '.join(parts)}"
    if not _is_dataset(folder) and not any(_files(folder)):
        return f"'{source}': there is no text in that folder ({', '.join(_TEXT)} or .parquet)"
    return None


@functools.cache
def documents(source: str, most_bytes: int | None) -> Sequence[bytes]:
    """Documents in a fixed order, cut where there are so many bytes.

    ``topics``: the paragraphs of Python's help on its own language that are not held out. ``library``: the source files
    of Python's own library. Else a folder: each text file is a document, each row of the column ``text`` of a Parquet
    file or of what ``datasets`` saved.

    Raises:
        Unsuitable: if there is no text, or what reads it is not installed.
        Damaged: if a file is no Parquet.
    """
    found: list[bytes] = []
    left = most_bytes
    for document in _all(source):
        if not document:
            continue
        found.append(document if left is None else document[:left])
        if left is not None:
            left -= len(found[-1])
            if left <= 0:
                break
    if not found:
        raise Unsuitable(f"there is no text in {source}: all of it is empty")
    return found


def _all(source: str) -> Iterator[bytes]:
    if source == "topics":
        # Each with the blank line after it, which held-out text has too: what has never seen one pays for all of them.
        yield from (paragraph + b"\n\n" for paragraph in corpus.split()[0].split(b"\n\n"))
        return
    if source == "library":
        yield from map(Path.read_bytes, sorted(_library()))
        return
    folder = Path(source).expanduser()
    if _is_dataset(folder):
        yield from _saved_by_datasets(folder)
        return
    for path in _files(folder):
        if path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield path.read_bytes()


def _library() -> Iterator[Path]:
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        # In pydoc_data lies the help text, with all that is held out.
        folders[:] = [name for name in folders if name not in ("site-packages", "pydoc_data")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _saved_by_datasets(folder: Path) -> Iterator[bytes]:
    with _said_if_missing(folder, "datasets"):
        pyarrow()  # before datasets imports it
        datasets = importlib.import_module("datasets")
    data = datasets.load_from_disk(str(folder))
    _refuse_without_text({name: str(getattr(kind, "dtype", kind)) for name, kind in data.features.items()}, folder)
    for rows in data.select_columns(_COLUMN).iter(batch_size=1000):
        yield from (text.encode() for text in rows[_COLUMN] if text is not None)


def _parquet(path: Path) -> Iterator[bytes]:
    with _said_if_missing(path, "data"):
        arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            _refuse_without_text({field.name: str(field.type) for field in file.schema_arrow}, path)
            for batch in file.iter_batches(columns=[_COLUMN]):
                yield from (text.encode() for text in batch.column(0).to_pylist() if text is not None)
    except (arrow.ArrowException, OSError) as error:
        raise Damaged(f"{path}: {str(error).partition(chr(10))[0]}") from None


@contextmanager
def _said_if_missing(wanting: Path, extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unsuitable(
            f"reading {wanting} wants '{error.name}', which is not installed: pip install 'membench[{extra}]'"
        ) from None


def _refuse_without_text(columns: dict[str, str], where: Path) -> None:
    if _COLUMN not in columns:
        raise Unsuitable(f"{where} has no column '{_COLUMN}', but {', '.join(map(repr, columns))}")
    if columns[_COLUMN] not in ("string", "large_string", "string_view"):
        raise Unsuitable(f"{where}: column '{_COLUMN}' holds {columns[_COLUMN]}, and text is wanted")


def _is_dataset(folder: Path) -> bool:
    """Whether a folder is what ``datasets`` saved."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _files(folder: Path) -> Iterator[Path]:
    """Files of text in a folder, by name."""
    return (path for path in sorted(folder.rglob("*")) if path.suffix in (*_TEXT, ".parquet") and path.is_file())
