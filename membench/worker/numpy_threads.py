"""The threads of numpy's matrix products: OpenBLAS is loaded with one, because threads do not survive a fork."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from typing import Any

from membench.host import procfs

_TOUCHING = (128, 512, 4096)
"""Rows, inner width and columns of a product that uses most of the buffers of all threads."""


def set_numpy_threads(threads: int | None) -> None:
    """Let numpy's products use as many threads as in a user's process, and touch the buffers that they keep.

    With another library than OpenBLAS (MKL, Accelerate) nothing is changed.
    """
    if threads is None or "numpy" not in sys.modules:
        return
    libraries = procfs.loaded_libraries("openblas")  # numpy and scipy bring their own
    found = [set_threads for library in libraries if (set_threads := _setter(library)) is not None]
    for set_threads in found:
        set_threads(threads)
    if found:
        import numpy

        rows, inner, columns = _TOUCHING
        for kind in (numpy.float32, numpy.float64):
            numpy.matmul(numpy.ones((rows, inner), kind), numpy.ones((inner, columns), kind))


def _setter(library: str) -> Callable[[int], object] | None:
    """Return the function that sets the number of threads; builds of OpenBLAS add something to its name."""
    loaded = ctypes.CDLL(library)
    for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "_64", "")):
        found: Any = getattr(loaded, f"{prefix}openblas_set_num_threads{suffix}", None)
        if found is not None:
            found.argtypes, found.restype = [ctypes.c_int], None
            setter: Callable[[int], object] = found
            return setter
    return None
