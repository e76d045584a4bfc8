"""Control of glibc's malloc: default, or pinned, so that freed memory is returned at once and resident is live."""

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
    """Make malloc map every block over 64 KiB separately. Return whether it did; only glibc can."""
    libc = _libc()
    if libc is None:
        return False
    # With huge pages, touching a page would make its untouched neighbours resident.
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    settings = ((_MMAP_THRESHOLD, 65536), (_TRIM_THRESHOLD, 65536), (_ARENA_MAX, 1))
    accepted = [libc.mallopt(key, value) == 1 for key, value in settings]
    return all(accepted)


def unpin() -> None:
    """Restore the behavior of the default allocator.

    mallopt disables glibc's dynamic mmap threshold permanently. By default, the threshold rises to the size of the
    largest mapped block that was freed, up to 32 MiB. After the first step of a case, blocks of all sizes that were
    freed therefore come from the heap. A fixed threshold of 32 MiB reproduces that state.
    """
    libc = _libc()
    if libc is not None:
        libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(_ARENA_MAX, 0)


def settle() -> None:
    """Collect garbage, and return free heap memory and MKL's cached packing buffers to the kernel."""
    gc.collect()
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
