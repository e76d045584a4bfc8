"""Control of glibc's malloc: default, or pinned, so that freed memory is returned at once and resident is live."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from pathlib import Path

from membench.worker import malloc_counts

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_PR_SET_THP_DISABLE = 41
_BLOCK_BYTES = 2**20

_REPLACEMENTS = {"jemalloc": "mallctl", "tcmalloc": "tc_version", "mimalloc": "mi_version", "musl": None}
"""Allocators by a part of their file's name, and a function that only they have, for builds into other files."""

_REPLACEMENT: str | None = None
"""What ``pin`` found in this process instead of a malloc that can be pinned."""
_PINNED = False


def _libc() -> ctypes.CDLL | None:
    """Return glibc itself, also where another library's malloc goes before its own; ``None`` if there is none."""
    return ctypes.CDLL("libc.so.6") if platform.libc_ver()[0] == "glibc" else None


def pin() -> bool:
    """Make malloc map every block over 64 KiB separately. Return whether it does; only glibc's can.

    Threads keep heaps of their own (arenas). One heap for all would be simpler to read, but glibc never lifts such a
    limit again (M_ARENA_MAX): in timed steps, too, threads would wait for each other at every small block.
    """
    global _REPLACEMENT, _PINNED  # the malloc of a process is one for all of its modules
    libc = _libc()
    if libc is not None:
        # With huge pages, touching a page would make its untouched neighbours resident.
        libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
        # 65,536 mappings are glibc's default, which a user's variable may have lowered.
        for key, value in ((_MMAP_THRESHOLD, 65536), (_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 65536)):
            libc.mallopt(key, value)
    # mallopt is no witness: glibc accepts settings while another malloc is called.
    _PINNED = libc is not None and _counts_blocks()
    _REPLACEMENT = None if _PINNED else _malloc_called()
    return _PINNED


def is_pinned() -> bool:
    """Whether glibc's malloc is called in this process, and returns what is freed at once."""
    return _PINNED


def state(wanted: str) -> str:
    """Return the state of the allocator for a record: as wanted, or the name of a malloc that cannot be pinned."""
    return _REPLACEMENT or wanted


def _counts_blocks() -> bool:
    """Return whether glibc counts each large block that the process gets, wherever it takes it from.

    That holds too if a profiler's malloc passes calls on to glibc's. Tensors come from posix_memalign, arrays of numpy
    from malloc.
    """
    process = ctypes.CDLL(None)
    process.malloc.restype, process.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    process.free.argtypes = [ctypes.c_void_p]
    process.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def is_counted(is_aligned: bool) -> bool:
        before = malloc_counts.counts()
        block = ctypes.c_void_p()
        if is_aligned:
            process.posix_memalign(ctypes.byref(block), 64, _BLOCK_BYTES)
        else:
            block.value = process.malloc(_BLOCK_BYTES)
        taken_bytes = malloc_counts.counts().taken_since(before)
        process.free(block)
        return taken_bytes >= _BLOCK_BYTES

    # Another thread may free a block in between.
    return all(any(is_counted(is_aligned) for _ in range(3)) for is_aligned in (False, True))


class _Symbol(ctypes.Structure):
    """The C struct ``Dl_info``."""

    _fields_ = [
        ("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("address", ctypes.c_void_p),
    ]  # fmt: skip


def _malloc_called() -> str:
    """Return the name of the allocator whose malloc this process calls."""
    process, found = ctypes.CDLL(None), _Symbol()
    process.dladdr.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    files: dict[str, str] = {}
    for function in ("malloc", "posix_memalign"):
        if process.dladdr(ctypes.cast(getattr(process, function), ctypes.c_void_p), ctypes.byref(found)):
            files.setdefault(Path(os.fsdecode(found.file or b"")).name, function)
    for name, own_function in _REPLACEMENTS.items():
        if any(name in file for file in files) or (own_function and hasattr(process, own_function)):
            return name
    foreign = [file for file in files if not re.match(r"libc[.-]", file)]
    return f"the {files[foreign[0]]} of {foreign[0]}" if foreign else "glibc's malloc with these settings"


def unpin() -> None:
    """Restore the behavior of the default allocator.

    mallopt disables glibc's dynamic mmap threshold permanently. By default, the threshold rises to the size of the
    largest mapped block that was freed, up to 32 MiB. After the first step of a case, blocks of all sizes that were
    freed therefore come from the heap. A fixed threshold of 32 MiB reproduces that state.
    """
    global _PINNED
    _PINNED = False
    libc = _libc()
    if libc is not None:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)


def settle() -> None:
    """Collect garbage, and return free heap memory and MKL's cached packing buffers to the kernel."""
    gc.collect()
    return_free()


def return_free() -> None:
    """Return free heap memory and MKL's cached packing buffers to the kernel."""
    _free_mkl_buffers()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _free_mkl_buffers() -> None:
    """Free the buffers, some 10 MiB, that MKL keeps after a matrix product in fp32; torch links MKL in libtorch_cpu."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.__file__:
        return
    try:
        free = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers
    except (OSError, AttributeError):  # a build without MKL
        return
    free.restype = None
    free()
