"""Temporary folders for files that workers exchange, and removal of those that dead runners left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from membench.errors import MembenchError

_NAME = re.compile(r"membench-(\d+)-\w+")


class Scratch:
    """A temporary folder, locked as long as its runner lives, so that no other runner takes it for a leftover."""

    def __init__(self) -> None:
        """Make the folder, and remove those of dead runners.

        Raises:
            MembenchError: if it cannot be made.
        """
        try:
            sweep(Path(tempfile.gettempdir()))
            self.path = Path(tempfile.mkdtemp(prefix=f"membench-{os.getpid()}-"))
        except OSError as error:
            raise MembenchError(f"no folder for passing files: {error}") from None
        self._held = _locked(self.path)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def is_scratch(folder: Path) -> bool:
    """Return whether a path is that of a runner's scratch folder, which need not exist any more."""
    return _NAME.fullmatch(folder.name) is not None


def share(folder: Path) -> None:
    """Make a folder that several processes use; it is locked as long as one of them lives."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another runner has just taken it for a leftover
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_ino == folder.stat().st_ino:
                return  # the descriptor is held to the end of this process


def empty(folder: Path) -> None:
    """Remove the contents of a folder."""
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def sweep(where: Path) -> None:
    """Remove scratch folders of this user whose runner is dead.

    The process id in the name is not enough: a container with ids of its own may share the folder, and ids are used
    again. The lock must be free, too.
    """
    for folder in where.glob("membench-*"):
        named = _NAME.fullmatch(folder.name)
        with contextlib.suppress(OSError):
            if named is None or folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            if _lives(int(named[1])):
                continue
            held = _locked(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor that holds the lock; ``None`` if it is locked, or locks do not work."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
