"""What allocators take for a storage, as arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from membench.host.device import Device

_PAGE_BYTES = 4096
_MAPPED_FROM_BYTES = 2**16
"""What the pinned allocator maps for itself; see ``worker/allocator.py``."""
_ALIGNED_TO_BYTES = 64
"""To which torch aligns storages on a CPU."""
_HEADER_BYTES = 16
_CUDA_BLOCK_BYTES = 512


def size_on(device: Device) -> Callable[[int], int]:
    """Return what tells the bytes that a storage of so many bytes takes on a device."""
    return _on_cuda if device.on_gpu else _on_cpu


def _on_cpu(size_bytes: int) -> int:
    """Return what glibc's pinned malloc takes: whole pages for all but small ones, with its header in the first."""
    if not size_bytes:
        return 0
    unit = _PAGE_BYTES if size_bytes >= _MAPPED_FROM_BYTES else _HEADER_BYTES
    padded = size_bytes + _HEADER_BYTES + (_ALIGNED_TO_BYTES if unit == _PAGE_BYTES else 0)
    return -(-padded // unit) * unit


def _on_cuda(size_bytes: int) -> int:
    """Return what torch's caching allocator counts as allocated: whole blocks."""
    return -(-size_bytes // _CUDA_BLOCK_BYTES) * _CUDA_BLOCK_BYTES
