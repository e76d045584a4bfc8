"""Files of runs: JSON lines with a header first; each record is flushed to disk before the next case starts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from membench.errors import ResultsError
from membench.records.encoding import record_of
from membench.records.keepable import LONGEST_LINE_BYTES, encoded, keepable
from membench.records.record import PREPARING, SCHEMA_VERSION, Record
from membench.records.schema import Membership, check_header, check_record, check_version
from membench.records.strict_json import open_file, parsed
from membench.units import format_bytes

_LONGEST_LINE_BYTES = LONGEST_LINE_BYTES


@dataclass(frozen=True)
class Run:
    """A run's header and its records."""

    path: Path
    header: dict[str, Any]
    records: tuple[Record, ...]


class KeptElsewhere(ResultsError):
    """A run's file is gone or cannot be written; ``path`` is the file in which its records are now, if there is one."""

    def __init__(self, message: str, path: Path | None) -> None:
        super().__init__(message)
        self.path = path


class RunFile:
    """A run's file, open for appending records and locked against other runs. Use as a context manager."""

    def __init__(self, path: Path, flags: int) -> None:
        """Open the file and lock it.

        Raises:
            ResultsError: if it cannot be written to, or if another run is writing to it.
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
            # Some network file systems have no locks; on these the user must not start two runs on one file.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                self._close()
                raise ResultsError(f"{path}: cannot be locked: {error.strerror}") from None

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> RunFile:
        """Create a run's file and write its header.

        Raises:
            ResultsError: if the header cannot be written; the file is then removed.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{path.parent}: no folder for results: {error.strerror}") from None
        created = cls(path, os.O_CREAT | os.O_EXCL)
        try:
            created._write(encoded({"schema": SCHEMA_VERSION, **header}))
        except ResultsError:
            created._close()
            path.unlink(missing_ok=True)
            raise
        return created

    @classmethod
    def reopen(cls, path: Path) -> RunFile:
        """Open a run's file to continue it.

        Two things are removed: a last line that is incomplete because the run was killed, and records of cases that
        were not begun because the preparing of their model was killed, so that they are measured now.

        Raises:
            ResultsError: if it cannot be written to, or if another run is writing to it.
        """
        reopened = cls(path, 0)
        try:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            begun = b"".join(line for line in whole.splitlines(keepends=True) if not _is_unprepared(line))
            if begun != whole:
                return reopened._replaced(begun)
            if whole != content:
                os.truncate(reopened._descriptor, len(whole))
        except OSError as error:
            reopened._close()
            raise ResultsError(f"{path}: cannot be mended: {error.strerror}") from None
        return reopened

    def _replaced(self, content: bytes) -> RunFile:
        """Replace the file at once by one with other content, and return that, open and locked.

        Raises:
            OSError, ResultsError: if that fails; the file stays as it is.
        """
        partial = self.path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        replaced = RunFile(partial, os.O_CREAT | os.O_EXCL)
        try:
            replaced._write(content)
            os.replace(partial, self.path)
        except (OSError, ResultsError):
            replaced._close()
            partial.unlink(missing_ok=True)
            raise
        self._close()
        replaced.path = self.path
        return replaced

    def __enter__(self) -> RunFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def append(self, record: Record) -> Record:
        """Append a record and flush it to disk.

        Returns:
            the record as it is kept: a ``failed`` one if no reader would take all of it.

        Raises:
            KeptElsewhere: if the file is gone or cannot be written; the error says where the records are now.
            ResultsError: if nothing of the record can be kept. The file then ends with the previous record.
        """
        try:
            kept, line = keepable(record)
        except ResultsError as error:
            raise ResultsError(f"{error}; what was finished before is kept") from None
        self._refuse_lost(line)
        try:
            self._write(line)
        except ResultsError as error:
            elsewhere, unknown = self._copy(line)
            where = f"with this record in {elsewhere}" if elsewhere else f"without this record: {unknown}"
            raise KeptElsewhere(f"{error}; what was finished before is kept, {where}", elsewhere) from None
        return kept

    def continued_at(self, path: Path) -> RunFile:
        """Return the file that continues this one where its records are now: itself if it was moved, or a copy.

        Raises:
            ResultsError: if the copy cannot be written to.
        """
        if self._new_path() != path:
            return RunFile.reopen(path)
        self.path = path
        return self

    def check(self) -> None:
        """Check that the file is where it was created.

        Raises:
            KeptElsewhere: if it is not; the error says where the records are now.
        """
        self._refuse_lost(b"")

    def _refuse_lost(self, line: bytes) -> None:
        """Keep all records and a last line elsewhere if the file is no longer at its path.

        Raises:
            KeptElsewhere: if it is not.
        """
        if self._is_at_its_path():
            return
        if (moved_to := self._new_path()) is not None:
            self._write(line)
            raise KeptElsewhere(f"{self.path}: was moved to {moved_to}, where all records are kept", moved_to)
        elsewhere, unknown = self._copy(line)
        where = f"are kept in {elsewhere}" if elsewhere else f"are lost: {unknown}"
        raise KeptElsewhere(
            f"{self.path}: was removed or replaced while it was written; its records {where}", elsewhere
        )

    def _new_path(self) -> Path | None:
        """Return the path to which the file was moved; ``None`` if it has none any more."""
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if os.path.samestat(path.stat(), os.fstat(self._descriptor)):
                return path
        return None

    def _is_at_its_path(self) -> bool:
        opened = os.fstat(self._descriptor)
        try:
            found = self.path.stat()
        except OSError:
            return False
        # Some network file systems number a file anew.
        return opened.st_nlink > 0 and (os.path.samestat(opened, found) or opened.st_size == found.st_size)

    def _copy(self, line: bytes) -> tuple[Path | None, str]:
        """Copy what was written, and a line that was not, to a temporary folder.

        Returns:
            the copy, or ``None`` and the reason.
        """
        with contextlib.ExitStack() as undo:
            try:
                folder = tempfile.mkdtemp(prefix="membench-kept-")
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
                path = Path(folder) / self.path.name
                with open(f"/proc/self/fd/{self._descriptor}", "rb") as written, path.open("xb") as copy:
                    shutil.copyfileobj(written, copy)
                    copy.write(line)
            except OSError as error:
                return None, f"no copy in {tempfile.gettempdir()}: {error.strerror}"
            undo.pop_all()
        return path, ""

    def _close(self) -> None:
        os.close(self._descriptor)

    def _write(self, encoded_line: bytes) -> None:
        line = memoryview(encoded_line)
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
    """Read and check a run. An incomplete last line, left by a run that was killed, is ignored.

    Raises:
        ResultsError: if the file is not a run, has a newer schema or is invalid; the message names file, line and key.
    """
    path = Path(path)
    header: dict[str, Any] | None = None
    membership: Membership | None = None
    records = []
    number = 0  # the current line, for error messages
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
    """Yield the complete lines of a file. A line that is longer than any record is yielded cut off.

    Raises:
        OSError: if it cannot be read.
    """
    with open_file(path) as file:
        while line := file.readline(_LONGEST_LINE_BYTES + 1):
            if len(line) > _LONGEST_LINE_BYTES:
                yield line  # the reader counts the line and refuses it
            elif line.endswith(b"\n"):
                yield line


def _parsed(line: bytes) -> object:
    """Parse a line.

    Raises:
        ResultsError: if it is not JSON, or is longer than any record.
    """
    if len(line) > _LONGEST_LINE_BYTES:
        raise ResultsError(f"longer than any record: more than {format_bytes(_LONGEST_LINE_BYTES)}")
    return parsed(line)


def _is_unprepared(line: bytes) -> bool:
    if PREPARING.encode() not in line:
        return False
    with contextlib.suppress(ResultsError, KeyError, TypeError):  # readers report what is wrong with it
        entry: Any = parsed(line)
        return record_of(entry).is_unprepared
    return False


def newest_run(folder: str | Path) -> Path:
    """Return the path of the most recently written run in a folder.

    Raises:
        ResultsError: if there is none.
    """
    found = find_run(Path(folder))
    if found is None:
        raise ResultsError(f"{folder}: no run there; 'membench run quickstart' makes one")
    return found


def find_run(folder: Path, suite: str | None = None, since: str = "", shard: str | None = None) -> Path | None:
    """Return the path of the most recently written run in a folder; ``None`` if there is none.

    Args:
        suite: the name of the run's suite; ``None``: any.
        since: the earliest start of the run (ISO, UTC).
        shard: the share of the suite that the run is to be of; ``None``: of the whole suite.
    """
    newest: tuple[int, Path] | None = None
    for path in sorted(folder.glob("*.jsonl")):
        header = _header(path)
        if header is None or header.get("started_at", "") < since:
            continue
        if suite is not None and (suite, shard) != (header["suite"], header.get("shard")):
            continue
        with contextlib.suppress(OSError):  # the file was removed in the meantime
            written_at = path.stat().st_mtime_ns
            if newest is None or written_at >= newest[0]:
                newest = written_at, path
    return newest[1] if newest else None


def _header(path: Path) -> dict[str, Any] | None:
    """Read the header of a run; ``None`` if the file is not a run."""
    try:
        header = _parsed(next(_lines(path), b""))
        if not isinstance(header, dict) or "run" not in header:
            return None
        check_header(header)
    except (OSError, ResultsError):
        return None
    return header
