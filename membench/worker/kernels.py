"""Compiled kernels of a case: a folder of its own for them, and a cache that holds what its rehearsal compiles.

torch.compile, triton and torch's C++ extensions trust whatever lies in their caches: a library that a killed compiler
left empty fails every later process. So no case uses the user's caches. It compiles into a folder that is removed with
it, and starts with the libraries that the same rehearsal compiled before, from an archive that is checked when read.

Kept are the C++ compiler's libraries alone, not what torch's own compiler finds out on the way: with that, the
rehearsal would not import the compiler, and 24 MiB of its code would be live memory of the first step. What measured
steps compile is not kept either. So the figures of a case are the same whatever ran before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from membench.host import scratch
from membench.host.cache import cache_folder
from membench.host.environment import installed_version, processor_flags
from membench.protocol.requests import MeasureCase
from membench.worker.agreement import on_any

if TYPE_CHECKING:
    from membench.plugins import Ranks

_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "extensions",
}
_COMPILED = (".so", ".cubin", ".hsaco")
_LARGEST_ARCHIVE_BYTES, _MOST_BYTES = 128 * 2**20, 512 * 2**20
_LONGEST_UNUSED_S, _LONGEST_WRITING_S = 60 * 86400.0, 3600.0
_VERSION = 1  # to be raised with any change to what an archive holds


class Kernels:
    """The compiled kernels of one rank of a case.

    Attributes:
        notes: what was thrown away and compiled anew.
    """

    def __init__(self, request: MeasureCase, device: str, scratch_folder: Path) -> None:
        """Have the compilers of this process and of its children use the case's own folder, and fill it.

        Args:
            device: the device of this rank, as torch names it.
            scratch_folder: the folder for files of the case.
        """
        self.notes: list[str] = []
        self._folder = scratch_folder / "kernels"
        self._archive = kept_kernels() / f"{_fingerprint(request, device)}.zip"
        self._restored: frozenset[str] = frozenset()
        for variable, name in _CACHES.items():
            os.environ[variable] = str(self._folder / name)
        self._restore()

    def count(self) -> int:
        """Return how many compiled libraries are in the case's folder."""
        return sum(path.suffix in _COMPILED for path in self._folder.rglob("*"))

    def _restore(self) -> None:
        try:
            with zipfile.ZipFile(self._archive) as archive:
                archive.extractall(self._folder)  # checks the CRC of each file
            os.utime(self._archive)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return
        except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
            self._throw_away("their archive in membench's cache was damaged")
            return
        self._restored = self._libraries()

    def used_by(self, rehearse: Callable[[], str | None], ranks: Ranks | None = None) -> str | None:
        """Rehearse, once more without the kernels there if that fails, and keep what was compiled if it succeeds.

        Args:
            rehearse: returns its error, or ``None``.
            ranks: rehearse once more together, if one of them has to.

        Returns:
            the error of the last rehearsal.
        """
        failed = rehearse()
        if on_any(ranks, failed is not None and self.count() > 0):
            reason = (
                "the rehearsal of another rank failed"
                if failed is None
                else f"the rehearsal with them failed ({failed})"
            )
            self._throw_away(reason)
            failed = rehearse()
        if failed is None:
            self._keep()
        return failed

    def _throw_away(self, reason: str) -> None:
        scratch.empty(self._folder)
        with contextlib.suppress(OSError):
            self._archive.unlink(missing_ok=True)
        self._restored = frozenset()
        self.notes.append(f"compiled kernels were thrown away, and compiled anew: {reason}")

    def _keep(self) -> None:
        """Archive what a successful rehearsal has compiled, if that is new, and remove old archives.

        An archive is written beside its place and renamed, so that readers and a killed writer leave it whole.
        """
        libraries = self._libraries()
        if libraries <= self._restored:
            return
        folder = self._archive.parent
        with contextlib.suppress(OSError):  # where it cannot be written, the next run compiles again
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix="writing-", dir=folder)
            try:
                with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name in sorted(libraries):
                        archive.write(self._folder / name, name)
                if Path(partial).stat().st_size <= _LARGEST_ARCHIVE_BYTES:
                    os.replace(partial, self._archive)
            finally:
                Path(partial).unlink(missing_ok=True)
            prune(folder)

    def _libraries(self) -> frozenset[str]:
        """Return the libraries to keep, relative to the case's folder: they are named by a hash of their source."""
        found = (self._folder / "inductor").rglob("*.so")
        return frozenset(str(path.relative_to(self._folder)) for path in found if path.stat().st_size)


def kept_kernels() -> Path:
    """Return the folder of the archives; it need not exist."""
    return cache_folder() / "kernels"


def prune(folder: Path) -> None:
    """Remove archives that were not used for long, the longest unused beyond a total size, and unfinished ones."""
    now_s, total_bytes = time.time(), 0
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another run has removed it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    for used_s, size_bytes, path in sorted(found, reverse=True):
        longest_s = _LONGEST_UNUSED_S if path.suffix == ".zip" else _LONGEST_WRITING_S
        total_bytes += size_bytes
        if now_s - used_s > longest_s or total_bytes > _MOST_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()


def _fingerprint(request: MeasureCase, device: str) -> str:
    """Return a hash of what decides which libraries a rehearsal compiles, and whether they run here."""
    compiler = Path(shutil.which(os.environ.get("CXX", "g++")) or "").resolve()
    facts = {
        "version": _VERSION,
        "case": [dataclasses.asdict(plugin) for plugin in (request.model, *request.techniques, request.workload)],
        "device": device,
        "packages": {name: installed_version(name) for name in ("torch", "triton", "torchao")},
        "python": sys.version,
        "libc": platform.libc_ver(),
        "processor": [platform.machine(), processor_flags()],
        "compiler": [str(compiler), compiler.stat().st_mtime_ns if compiler.is_file() else None],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
