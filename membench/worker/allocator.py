"""glibc's malloc, pinned (freed memory goes back at once, so resident is live) or as a user's process has it."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_PR_SET_THP_DISABLE = 41


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def pin() -> bool:
    """Give every block over 64 KiB a mapping of its own. False where the C library is not glibc."""
    libc = _libc()
    if libc is None:
        return False
    # Huge pages would make untouched neighbours resident.
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    settings = ((_MMAP_THRESHOLD, 65536), (_TRIM_THRESHOLD, 65536), (_ARENA_MAX, 1))
    accepted = [libc.mallopt(key, value) == 1 for key, value in settings]
    return all(accepted)


def unpin() -> None:
    """Behave like the default again.

    mallopt switches glibc's dynamic threshold off for good. Left alone it rises to the largest mapped block that was
    ever freed, 32 MiB at most, so after the first step every freed size is served from the heap: 32 MiB is that state.
    """
    libc = _libc()
    if libc is not None:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(_ARENA_MAX, 0)


def settle() -> None:
    """Collect garbage and hand free heap back to the kernel, with the packing buffers that MKL keeps between calls."""
    gc.collect()
    _free_mkl_buffers()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _free_mkl_buffers() -> None:
    """Some 10 MiB that a matrix product in fp32 leaves behind; torch carries MKL inside libtorch_cpu."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.__file__:
        return
    try:
        free = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers
    except (OSError, AttributeError):  # a build without MKL
        return
    free.restype = None
    free()
