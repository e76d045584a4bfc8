"""What this machine's kernels take beside their arguments and results, found by running each of them for real.

Libraries of matrix products pack their arguments into buffers (MKL), compile code for each shape (oneDNN), and reorder
whole arguments. How much depends on the shapes, the processor's instructions and the number of threads, and is not
documented. So it is measured: llama-15m's head in fp32 takes 22 MiB of buffers on AVX-512 with two threads, and each
shape of a product in bf16 0.6 MiB of code on AMX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from membench.host import procfs
from membench.worker import allocator, device, malloc_counts

_NOISE_BYTES = 2**15
"""What the kernel's counters may be off by after few pages were touched: less is taken to be nothing."""
_LEAST_CODE_BYTES = 2**18
"""A product in bf16 left 0.57 MiB or more of code. What heaps keep after a call is less; it would add up."""


@dataclass(frozen=True)
class Like:
    """The layout of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        return cls(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))

    def clipped(self, shape: Sequence[int]) -> Like:
        """Return a dense layout of a smaller shape, whose dimensions lie in memory in the same order."""
        strides, step = [0] * len(shape), 1
        for place in sorted(range(len(shape)), key=lambda each: (self.strides[each], -each)):
            strides[place], step = step, step * shape[place]
        return Like(self.dtype, tuple(shape), tuple(strides))

    def real(self) -> torch.Tensor:
        """Return such a tensor of zeros."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype).zero_()


@dataclass(frozen=True)
class Call:
    """A call of an operation, with the layouts of tensors in their place."""

    operation: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
        return cls(operation, *tree_map_only(torch.Tensor, Like.of, (arguments, dict(options))))

    @property
    def key(self) -> str:
        """A text that is the same for calls whose kernels take the same."""
        return f"{self.operation} {self.arguments} {self.options}"

    def real(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made: tuple[tuple[Any, ...], dict[str, Any]]
        made = tree_map_only(Like, Like.real, (self.arguments, dict(self.options)))
        return made


@dataclass(frozen=True)
class Taken:
    """Memory of a kernel, in bytes.

    Attributes:
        working_bytes: while it runs, beside its arguments and results and what follows.
        buffers_bytes: what its library keeps until it is asked to free it, for the next call of any operation.
        code_bytes: what is kept for good: code compiled for these shapes.
    """

    working_bytes: int = 0
    buffers_bytes: int = 0
    code_bytes: int = 0


def warm_up() -> None:
    """Set up what libraries set up once, as a measured process does before its baseline: threads and their heaps.

    Not within a mode of torch's.
    """
    device.initialize("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.zeros(256, 256, dtype=dtype)
        (matrix @ matrix).exp()


def measure(call: Call) -> Taken:
    """Run an operation on zeros, and read what it takes. The allocator has to be pinned.

    The first run compiles; what a second one takes while it runs is what each later one takes.
    """
    with _disable_current_modes(), torch.no_grad():
        arguments, options = call.real()
        allocator.return_free()
        before = _used_bytes()
        _run(call, arguments, options)
        allocator.return_free()
        code = _used_bytes() - before
        highest, kept = _run(call, arguments, options)
        allocator.return_free()
    is_code = code >= _LEAST_CODE_BYTES
    return Taken(_above_noise(highest - kept), _above_noise(kept), code if is_code else 0)


def buffers_after(calls: Sequence[Call]) -> int:
    """Run operations one after the other, and return the bytes of the buffers that are then kept for all of them.

    They are more than those of any one of them and less than their sum, since libraries use them again where they fit.
    The first round compiles what this process has not compiled yet, and is not counted.
    """
    with _disable_current_modes(), torch.no_grad():
        for call in calls:
            _run_once(call)
        allocator.return_free()
        before = _used_bytes()
        for call in calls:
            _run_once(call)
        kept = _used_bytes() - before
        allocator.return_free()
    return _above_noise(kept)


def _run_once(call: Call) -> None:
    arguments, options = call.real()
    call.operation(*arguments, **options)


def _run(call: Call, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[int, int]:
    """Return how much more is resident at the highest moment and at the end than before, without results."""
    known = _storages((arguments, options))
    before = _used_bytes()
    counted = procfs.resident()
    procfs.reset_peak()
    results = call.operation(*arguments, **options)
    peak = procfs.resident()
    kept = _used_bytes() - before
    new = sum(size for address, size in _storages(results).items() if address not in known)
    highest = peak.peak_bytes - peak.file_bytes - counted.private_bytes - counted.shared_bytes
    return highest - new, kept - new


def _above_noise(size_bytes: int) -> int:
    return size_bytes if size_bytes > _NOISE_BYTES else 0


def _used_bytes() -> int:
    """Return the resident bytes less what malloc's heaps hold free, as measuring a case counts them."""
    counted, free = procfs.counted_page_by_page(), malloc_counts.free_resident_bytes()
    if counted is not None:
        return sum(counted) - free
    resident = procfs.resident()
    return resident.private_bytes + resident.shared_bytes - free


def _storages(held: Any) -> dict[int, int]:
    """Return the bytes of the storages of all tensors in an object, by address."""
    found: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tree_map_only(torch.Tensor, add, held)
    return found
