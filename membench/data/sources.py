"""Where training text comes from: Python's own, or files of a folder, as documents."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from membench import corpus

BUILT_IN = ("topics", "library")
_TEXT = (".txt", ".md", ".py", ".json", ".jsonl", ".html", ".csv")


def problem(source: str) -> str | None:
    """What is wrong with a source, as far as its name tells."""
    if source in BUILT_IN:
        return None
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return f"'{source}' is neither {' nor '.join(BUILT_IN)}, nor a folder here"
    if not is_dataset(folder) and not any(files(folder)):
        return f"'{source}': there is no text in that folder ({', '.join(_TEXT)} or .parquet)"
    return None


@functools.cache
def documents(source: str, most_bytes: int | None) -> Sequence[bytes]:
    """Documents in a fixed order, cut where there are so many bytes.

    ``topics``: the paragraphs of Python's help on its own language that are not held out. ``library``: the source files
    of Python's own library. Else a folder: each text file is a document, each row of the column ``text`` of a Parquet
    file or of what ``datasets`` saved.

    Raises:
        ValueError: if there is no text.
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
        raise ValueError(f"there is no text in {source}")
    return found


def _all(source: str) -> Iterator[bytes]:
    if source == "topics":
        yield from corpus.split()[0].split(b"\n\n")
        return
    if source == "library":
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" not in path.parts:
                yield path.read_bytes()
        return
    folder = Path(source).expanduser()
    if is_dataset(folder):
        import datasets

        for row in datasets.load_from_disk(str(folder)):
            yield str(row["text"]).encode()
        return
    for path in files(folder):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
                yield from (str(text).encode() for text in batch.column(0).to_pylist())
        else:
            yield path.read_bytes()


def is_dataset(folder: Path) -> bool:
    """Whether a folder is what ``datasets`` saved."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def files(folder: Path) -> Iterator[Path]:
    """Files of text in a folder, by name."""
    return (path for path in sorted(folder.rglob("*")) if path.suffix in (*_TEXT, ".parquet") and path.is_file())
