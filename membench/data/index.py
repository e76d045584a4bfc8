"""The index of a folder of frames: how large each is, and its checksum, so that no library sees what was not written.

Everything else follows from what is to be read: how many frames there are, where each lies, how much it decodes to. A
damaged index can so ask for no other file, no other place and no more memory.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from xxhash import xxh3_64_intdigest

from membench.data.order import frame_rows
from membench.plugins.storage import Buffer, Damaged, Extent, Storage

_NAME, _VERSION = "index.json", 3
_Size = Annotated[int, Field(ge=0)]
checksum = xxh3_64_intdigest


class Kept(NamedTuple):
    """What the index knows of a frame."""

    stored_bytes: _Size
    checksum: _Size
    """XXH3 in 64 bits: CRC-32 takes a third as long as decompressing LZ4 does, and this a fiftieth."""


class Entry(NamedTuple):
    """Where a frame lies, and what it must be."""

    path: Path
    offset: int
    stored_bytes: int
    checksum: int
    rows: int

    @property
    def end(self) -> int:
        return self.offset + self.stored_bytes


class _Versioned(BaseModel):
    """What every version of an index says."""

    version: int


def _version(content: bytes) -> int | None:
    """Of an index that is none of this version."""
    try:
        return _Versioned.model_validate_json(content).version
    except ValidationError:
        return None


class _Index(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: int = _VERSION
    extent: Extent
    layout: str
    codec: str | None
    frame_rows: int
    head_bytes: _Size = 0
    """What a file has before its first frame."""
    foot_bytes: _Size = 0
    """What a file has after its last frame."""
    head_and_foot_checksum: _Size = 0
    frames: list[Kept]


def write(
    folder: Path, extent: Extent, storage: Storage, frames: list[Kept], head_and_foot: tuple[bytes, bytes] = (b"", b"")
) -> None:
    head, foot = head_and_foot
    index = _Index(
        **_header(extent, storage), frames=frames, head_bytes=len(head), foot_bytes=len(foot),
        head_and_foot_checksum=checksum(head + foot),
    )  # fmt: skip
    (folder / _NAME).write_text(index.model_dump_json())


def read(folder: Path, extent: Extent, storage: Storage, name: Callable[[int], str]) -> list[Entry]:
    """The frames, by their numbers; their files are there and are as long as they should be.

    Args:
        name: of the file that a frame lies in; those of one file follow each other.

    Raises:
        Damaged: if there is no index, or it is not of these rows, or does not fit the files beside it.
    """
    path = folder / _NAME
    try:
        content = path.read_bytes()
        index = _Index.model_validate_json(content)
    except FileNotFoundError:
        raise Damaged(f"{folder}: no training data are here: {_NAME} is missing") from None
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        if (version := _version(content)) not in (None, _VERSION):
            raise Damaged(f"{path}: what is here is of version {version}, and {_VERSION} is to be read") from None
        wrong = error.errors()[0]
        raise Damaged(f"{path}: no index of frames: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    wanted = _header(extent, storage)
    if (kept := index.model_dump(include=set(wanted))) != wanted:
        raise Damaged(f"{path}: what is here is {_told(kept)}, and {_told(wanted)} is to be read")
    step = frame_rows(storage, extent)
    starts = range(0, extent.rows, step)
    if len(index.frames) != len(starts):
        raise Damaged(f"{path}: {len(index.frames)} frames are here, and {len(starts)} are to be read")
    entries: list[Entry] = []
    for number, (kept_frame, start) in enumerate(zip(index.frames, starts, strict=True)):
        file = folder / name(number)
        follows = entries and entries[-1].path == file
        offset = entries[-1].end if follows else index.head_bytes
        entries.append(Entry(file, offset, *kept_frame, min(step, extent.rows - start)))
    _check_files(index, entries)
    return entries


class OpenFile:
    """A file of frames, open for as long as this is there; any thread may read from it.

    Raises:
        Damaged: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Damaged(f"{path}, offset 0: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)

    def bytes_of(self, run: Sequence[Entry]) -> bytes:
        """The bytes of frames that follow each other; those that are not there are missing.

        Raises:
            Damaged: if they cannot be read.
        """
        offset = run[0].offset
        try:
            return os.pread(self._descriptor, run[-1].end - offset, offset)
        except OSError as error:
            raise Damaged(f"{self._path}, offset {offset}: {error.strerror}") from None


def frames_of(stored: Buffer, run: Sequence[Entry]) -> list[Buffer]:
    """Each frame of bytes that hold several, one after the other.

    Raises:
        Damaged: if one is not what was written.
    """
    frames: list[Buffer] = [stored]
    if len(run) > 1:
        ends = itertools.accumulate((entry.stored_bytes for entry in run), initial=0)
        whole = memoryview(stored)
        frames = [whole[start:end] for start, end in itertools.pairwise(ends)]
    for frame, entry in zip(frames, run, strict=True):
        if len(frame) != entry.stored_bytes or checksum(frame) != entry.checksum:
            raise Damaged(f"{entry.path}, offset {entry.offset}: the frame's checksum is not what the index says")
    return frames


def _header(extent: Extent, storage: Storage) -> dict[str, Any]:
    """What must be known to read frames at all."""
    return {
        "version": _VERSION, "extent": extent, "layout": storage.layout.name,
        "codec": storage.codec.name if storage.codec else None, "frame_rows": frame_rows(storage, extent),
    }  # fmt: skip


def _told(header: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value if key != 'extent' else tuple(value)}" for key, value in header.items())


def _check_files(index: _Index, entries: list[Entry]) -> None:
    """Raise ``Damaged`` if a file is shorter or longer than its frames, or begins or ends otherwise than it did."""
    ends = {entry.path: entry.end for entry in entries}
    sizes = {path: _size(path) for path in ends}
    for entry in entries:
        if sizes[entry.path] < entry.end:
            raise Damaged(
                f"{entry.path}, offset {entry.offset}: a frame of {entry.stored_bytes} bytes should be here, "
                f"and the file ends at {sizes[entry.path]}"
            )
    head_and_foot = b""
    for path, end in ends.items():
        if sizes[path] != end + index.foot_bytes:
            raise Damaged(
                f"{path}, offset {end}: {index.foot_bytes} bytes should be here, and the file ends at {sizes[path]}"
            )
        if index.head_bytes or index.foot_bytes:  # shards have none, and may be thousands of files
            with path.open("rb") as file:
                head_and_foot = file.read(index.head_bytes)
                file.seek(end)
                head_and_foot += file.read()
    if checksum(head_and_foot) != index.head_and_foot_checksum:
        raise Damaged(
            f"{entries[-1].path}, offset 0 or {end}: the checksum of head and foot is not what the index says"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
