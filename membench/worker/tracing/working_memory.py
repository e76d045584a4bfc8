"""What kernels take beside their arguments and results, as it is known for a device."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from membench.host import environment
from membench.host.cache import cache_folder
from membench.host.device import Device
from membench.worker import allocator
from membench.worker.tracing import collectives, kernel_probe
from membench.worker.tracing.kernel_probe import Call, Like, Taken

BUFFERS = "buffers that libraries keep between matrix products"
CODE = "code that libraries compiled for the shapes"
CUBLAS = "cuBLAS' workspace"
_METHOD = 2
"""The number of the way in which kernels are measured: what was measured in another way is not read."""
_MOST_PRODUCTS = 2**35
"""Of numbers, in a matrix product that is run for real, which takes about a second; of a larger one a part is run."""
_MOST_BYTES = 2**29
"""Of the arguments and results of an operation that is run for real."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_TAKE_NOTHING = frozenset((
    "_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "_to_copy", "_unsafe_view",
    "add_", "arange", "bernoulli_", "cat", "clone", "copy_", "detach_", "embedding", "embedding_dense_backward",
    "empty_like", "fill_", "full_like", "mean", "new_empty", "new_empty_strided", "new_full", "new_zeros",
    "nll_loss_backward", "nll_loss_forward", "normal_", "ones_like", "rand_like", "randn_like", "random_", "resize_",
    "select_backward", "set_", "slice_backward", "split_with_sizes_copy", "stack", "sum", "uniform_", "zero_",
    "zeros_like",
))  # fmt: skip
"""Operations that were measured to take nothing beside their results, apart from those that torch tags as pointwise."""


class Kernels(Protocol):
    """Tells what kernels take on a device, and keeps account of it for a case."""

    def working_bytes(self, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], found: Any) -> int:
        """Return what an operation takes while it runs."""
        ...

    def begin_at_baseline(self) -> None:
        """Make what is kept so far, by a rehearsal of the case, a part of the baseline."""
        ...

    def begin(self) -> None:
        """Begin a phase: libraries were asked to free their buffers."""
        ...

    def added_bytes(self) -> dict[str, int]:
        """Return what is held during the phase beside all tensors, by what it is."""
        ...

    @property
    def kept_bytes(self) -> int:
        """What is kept when a phase has ended."""
        ...


def of(device: Device, threads: int | None) -> Kernels:
    """Return what is known of the kernels of a device: measured here for a CPU, which has to be this machine's.

    Args:
        threads: with how many each rank would compute; ``None``: no kernel is to be run.
    """
    if device.on_gpu:
        return KernelsOfCuda()
    return KernelsUnseen() if threads is None else KernelsHere(threads)


class KernelsUnseen:
    """Kernels that are not run: what they take beside tensors is taken to be nothing."""

    kept_bytes = 0

    def working_bytes(self, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], found: Any) -> int:
        del operation, arguments, options, found
        return 0

    def begin_at_baseline(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def added_bytes(self) -> dict[str, int]:
        return {}


class KernelsHere:
    """Runs each operation once for real, on this machine, and keeps what it took in the folder of caches.

    Args:
        threads: the number of threads with which the case would run.
    """

    def __init__(self, threads: int) -> None:
        allocator.pin()
        torch.set_num_threads(threads)
        kernel_probe.warm_up()
        self._file = cache_folder() / "kernel-memory" / f"{_machine(threads)}-{_METHOD}.json"
        self._known = _read(self._file)
        self._new: dict[str, list[int]] = {}
        self._calls: dict[str, Call] = {}  # of this phase, those that leave buffers
        self._code: dict[str, int] = {}
        self._at_baseline: frozenset[str] = frozenset()

    def working_bytes(self, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], found: Any) -> int:
        if not _may_take(operation):
            return collectives.gloo_bytes(operation, arguments)
        call = Call.of(operation, arguments, options)
        if not any(isinstance(each, Like) for each in tree_leaves(call.arguments)):
            return 0  # it makes a tensor of nothing
        if operation.overloadpacket.__name__ in _PRODUCTS:
            call = _affordable(call)
        elif _size_bytes((arguments, options, found)) > _MOST_BYTES:
            return 0
        key = call.key
        taken = Taken(*self._look_up(key, lambda: _measured(call)))
        if taken.buffers_bytes:
            self._calls.setdefault(key, call)
        if taken.code_bytes:
            self._code.setdefault(key, taken.code_bytes)
        return taken.working_bytes

    def _look_up(self, key: str, measure: Any) -> list[int]:
        digest = hashlib.sha256(key.encode()).hexdigest()[:20]
        if digest not in self._known:
            self._known[digest] = self._new[digest] = measure()
        return self._known[digest]

    def begin_at_baseline(self) -> None:
        self._at_baseline = frozenset(self._code)

    def begin(self) -> None:
        self._calls.clear()

    def added_bytes(self) -> dict[str, int]:
        added = {CODE: self.kept_bytes}
        if self._calls:
            calls = list(self._calls.values())
            (added[BUFFERS],) = self._look_up(f"after {list(self._calls)}", lambda: [kernel_probe.buffers_after(calls)])
        self._keep()
        return {what: size for what, size in added.items() if size}

    @property
    def kept_bytes(self) -> int:
        return sum(size for key, size in self._code.items() if key not in self._at_baseline)

    def _keep(self) -> None:
        """Add what was measured to the file; another process may have written it meanwhile."""
        if not self._new:
            return
        with contextlib.suppress(OSError):  # then it is measured again the next time
            self._file.parent.mkdir(parents=True, exist_ok=True)
            made = self._file.with_suffix(f".{os.getpid()}")
            made.write_text(json.dumps(_read(self._file) | self._new))
            made.replace(self._file)
            self._new = {}


class KernelsOfCuda:
    """What CUDA's libraries take from torch's allocator, by torch's own rules.

    Kernels' working memory is not known.
    """

    # torch, aten/src/ATen/cuda/CUDABlas: :4096:2:16:8 (kB and blocks) unless CUBLAS_WORKSPACE_CONFIG says otherwise.
    # On cards of capability 9.0 and later it is :4096:8, 32 MiB: which card it will be is not known here.
    _CUBLAS_BYTES = (4096 * 2 + 16 * 8) * 1024

    def __init__(self) -> None:
        self._multiplies = False

    def working_bytes(self, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], found: Any) -> int:
        del arguments, options, found
        self._multiplies |= _may_take(operation) and operation.overloadpacket.__name__ in _PRODUCTS
        return 0

    def begin_at_baseline(self) -> None:
        self._multiplies = False  # the workspace of the rehearsal is freed

    def begin(self) -> None:
        pass

    def added_bytes(self) -> dict[str, int]:
        return {CUBLAS: self.kept_bytes} if self._multiplies else {}

    @property
    def kept_bytes(self) -> int:
        return self._CUBLAS_BYTES if self._multiplies else 0


def _may_take(operation: Any) -> bool:
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    name = operation.overloadpacket.__name__
    return not (
        operation.namespace != "aten"
        or operation.is_view
        or name in _TAKE_NOTHING
        or name.startswith(("_foreach_", "_fused_"))
        or torch.Tag.pointwise in operation.tags
        or torch.Tag.data_dependent_output in operation.tags
        or torch.Tag.dynamic_output_shape in operation.tags
    )


def _measured(call: Call) -> list[int]:
    try:
        taken = kernel_probe.measure(call)
    except Exception:  # it needs values that zeros do not stand for
        taken = Taken()
    return [taken.working_bytes, taken.buffers_bytes, taken.code_bytes]


def _affordable(call: Call) -> Call:
    """Return a matrix product of a part of the matrices, if they are large: what is packed hardly grows any more."""
    first, second = (each for each in call.arguments[-2:])
    *batch, rows, inner = first.shape
    sizes = [*batch, rows, inner, second.shape[-1]]
    while math.prod(sizes) > _MOST_PRODUCTS:
        place = sizes.index(max(sizes))
        sizes[place] //= 2
    *batch, rows, inner, columns = sizes
    if [*batch, rows, inner] == list(first.shape) and columns == second.shape[-1]:
        return call
    clipped = (first.clipped([*batch, rows, inner]), second.clipped([*batch, inner, columns]))
    full = [*batch, rows, columns]
    added = [_part(each, full) for each in call.arguments[:-2]]
    return Call(call.operation, (*added, *clipped), call.options)


def _part(added: Any, shape: list[int]) -> Any:
    """Return the layout of what is added to a product, for a product of a smaller shape."""
    if not isinstance(added, Like):
        return added
    of_each = zip(added.shape, shape[len(shape) - len(added.shape) :], strict=True)
    return added.clipped([min(own, most) for own, most in of_each])


def _size_bytes(held: Any) -> int:
    return sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)
    )  # fmt: skip


def _machine(threads: int) -> str:
    """Return a name for all that kernels' memory depends on beside shapes."""
    here = environment.describe(threads)
    parts = (here["processor"], here["cpu"], torch.__version__, threads, torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, list[int]]:
    try:
        read: dict[str, list[int]] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return read
