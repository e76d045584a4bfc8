"""Runs on disk: JSON lines, a header first, each record flushed before the next case starts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from membench.errors import ResultsError
from membench.records.encoding import as_json, record_of
from membench.records.record import SCHEMA_VERSION, Record
from membench.records.schema import Membership, check_header, check_record, check_version
from membench.records.strict_json import open_file, parsed
from membench.units import format_bytes

_LONGEST_LINE_BYTES = 2**29
"""Above the largest record: durations of the most steps that a suite may ask for, a number a part of each."""


@dataclass(frozen=True)
class Run:
    """A run's header and the records that finished."""

    path: Path
    header: dict[str, Any]
    records: tuple[Record, ...]


class RunFile:
    """Appends records to a run's file, which no other runner may write to meanwhile. Use as a context manager."""

    def __init__(self, path: Path, flags: int) -> None:
        """Open the file, and lock it.

        Raises:
            ResultsError: if it cannot be written to, or another runner does so now.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        except OSError as error:
            raise ResultsError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise ResultsError(f"{path}: another run is writing to it") from None
        except OSError as error:
            # Some network file systems know no locks; a run there is as safe as its user is careful.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self._close()
                raise ResultsError(f"{path}: cannot be locked: {error.strerror}") from None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> RunFile:
        """Begin a run's file.

        Raises:
            ResultsError: if the header cannot be written; no file is left then.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{path.parent}: no folder for results: {error.strerror}") from None
        created = cls(path, os.O_CREAT | os.O_EXCL)
        try:
            created._write({"schema": SCHEMA_VERSION, **header})
        except ResultsError:
            created._close()
            path.unlink(missing_ok=True)
            raise
        return created

    @classmethod
    def reopen(cls, path: Path) -> RunFile:
        """Go on with a run's file; a last line that a kill left half written is cut off.

        Raises:
            ResultsError: if it cannot be written to, or another runner does so now.
        """
        reopened = cls(path, 0)
        try:
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(reopened._descriptor, content.rfind(b"\n") + 1)
        except OSError as error:
            reopened._close()
            raise ResultsError(f"{path}: cannot be mended: {error.strerror}") from None
        return reopened

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def append(self, record: Record) -> None:
        """Write a record and wait until it is on the disk.

        Raises:
            ResultsError: if that fails; the file then ends with the record before.
        """
        try:
            self._write(as_json(record))
        except ResultsError as error:
            raise ResultsError(f"{error}; what was finished before is kept") from None

    def _close(self) -> None:
        os.close(self._descriptor)

    def _write(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        # Names of files in messages may hold what is no character; readers refuse that.
        line = memoryview(text.encode(errors="replace") + b"\n")
        before = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._descriptor, before)
            raise ResultsError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_run(path: str | Path) -> Run:
    """Read a run and check all of it; a half-written last line (a runner killed while writing) is passed over.

    Raises:
        ResultsError: naming file, line and key, if the file is no run, of a newer schema, or holds what no run does.
    """
    path = Path(path)
    header: dict[str, Any] | None = None
    membership: Membership | None = None
    records = []
    number = 0  # of the line that an error is about
    try:
        for number, line in enumerate(_lines(path), 1):  # noqa: B007
            entry = check_version(_parsed(line))
            if header is None or membership is None:
                if "run" not in entry:
                    break
                check_header(entry)
                header, membership = entry, Membership(entry)
            else:
                processes = check_record(entry)
                membership.check(entry)
                records.append(record_of(entry, processes))
    except ResultsError as error:
        raise ResultsError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    if header is None:
        raise ResultsError(f"{path}: not the results of a run (no header)")
    return Run(path, header, tuple(records))


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a file, one after the other.

    Raises:
        OSError: if it cannot be read.
        ResultsError: if a line is longer than any record.
    """
    with open_file(path) as file:
        while line := file.readline(_LONGEST_LINE_BYTES + 1):
            if len(line) > _LONGEST_LINE_BYTES:
                yield line  # the reader counts it, then refuses it
            elif line.endswith(b"\n"):
                yield line


def _parsed(line: bytes) -> object:
    """What a line holds.

    Raises:
        ResultsError: if that is not JSON.
    """
    if len(line) > _LONGEST_LINE_BYTES:
        raise ResultsError(f"longer than any record: more than {format_bytes(_LONGEST_LINE_BYTES)}")
    return parsed(line)


def newest_run(folder: str | Path) -> Path:
    """The run written last in a folder.

    Raises:
        ResultsError: if there is none.
    """
    found = find_run(Path(folder))
    if found is None:
        raise ResultsError(f"{folder}: no run there; 'membench run quickstart' makes one")
    return found


def find_run(folder: Path, suite: str | None = None, since: str = "") -> Path | None:
    """The run written last in a folder, of one suite or of any, and begun at ``since`` (ISO, UTC) or later."""
    newest: tuple[int, Path] | None = None
    for path in sorted(folder.glob("*.jsonl")):
        header = _header(path)
        if header is None or suite not in (None, header["suite"]) or header.get("started_at", "") < since:
            continue
        with contextlib.suppress(OSError):  # removed meanwhile
            written_at = path.stat().st_mtime_ns
            if newest is None or written_at >= newest[0]:
                newest = written_at, path
    return newest[1] if newest else None


def _header(path: Path) -> dict[str, Any] | None:
    """A run's first line, or ``None`` if the file is no run."""
    try:
        header = _parsed(next(_lines(path), b""))
        if not isinstance(header, dict) or "run" not in header:
            return None
        check_header(header)
    except (OSError, ResultsError):
        return None
    return header
