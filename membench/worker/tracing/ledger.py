"""The live bytes of fake tensors: every storage that an operation creates is entered, and struck out when it dies."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from membench.worker.tracing import unknown_shapes

if TYPE_CHECKING:
    from types import FrameType

    from torch._subclasses.fake_tensor import FakeTensorMode

OPTIMIZER = "optimizer"
BETWEEN = "between"
"""The part of a step outside all parts that the workload names."""
_COMPARISONS = (torch.ops.aten.allclose.default, torch.ops.aten.equal.default)
_PLAIN = ("Tensor", "Parameter", "FakeTensor", "Buffer")


@dataclass
class Peak:
    """The highest live bytes of a span, and the operation at which they were reached."""

    bytes: int = 0
    operation: int = 0


@dataclass
class Span:
    """A phase or a step: its peak, and those of the parts in it."""

    began: int = 0
    """The number of the operation before it."""
    whole: Peak = field(default_factory=Peak)
    parts: dict[str, Peak] = field(default_factory=dict)

    def add(self, size_bytes: int) -> None:
        """Add what is held all the time beside tensors to each peak."""
        for peak in (self.whole, *self.parts.values()):
            peak.bytes += size_bytes


@dataclass(frozen=True)
class Moment:
    """What is alive at a moment of a step, and what happened then.

    Attributes:
        part: of the step.
        what: the operation and the sizes of its results. It is the same of layers that are alike.
    """

    part: str
    what: tuple[Any, ...]
    live_bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that exist. Use as a context manager inside a ``FakeTensorMode``.

    Operations of tensor subclasses (``DTensor``, torchao's) are left to the subclass, whose inner operations arrive
    here. An operation's own temporaries exist only inside its kernel; ``working_bytes`` tells those that are known.

    Args:
        size_of: the bytes that the device's allocator takes for a storage of so many bytes.
        working_bytes: of (operation, arguments, results): what its kernel takes while it runs.
    """

    def __init__(
        self,
        fake: FakeTensorMode,
        size_of: Callable[[int], int],
        working_bytes: Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], int] = lambda *_: 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.operation = 0
        self.sizes: dict[int, int] = {}
        """Of each living storage, by its address."""
        self.answered: set[str] = set()
        """Operations that asked for a value of a tensor, which a fake one has not: they were given 1."""
        self._fake, self._size_of, self._working_bytes = fake, size_of, working_bytes
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._left_out: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._at: Callable[[bool], None] | None = None
        self._timeline: list[Moment] | None = None
        self._at_operations: frozenset[int] = frozenset()
        self._of_infinities: set[int] = set()
        self._span, self._part = Span(), BETWEEN
        self._is_fused = self._is_aside = False

    def __enter__(self) -> Ledger:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size_bytes: int) -> Any:
            done = self._resize(storage, size_bytes)
            self._enter(storage)
            self._look(0, ("resize", size_bytes))
            return done

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]  # FSDP frees and takes what it gathers so
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__name__ not in _PLAIN and not issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if self._is_aside:
            return func(*args, **kwargs)
        has_values = not (args and isinstance(args[0], FakeTensor))
        if func is torch.ops.aten._local_scalar_dense.default and not has_values:
            if self._part != OPTIMIZER:  # which asks for the number of its step
                self.answered.add("a value of a tensor")
            return self._answer(args[0])
        if func in _COMPARISONS and not has_values:
            self.answered.add("whether tensors are equal")
            return True
        replaced_bytes = self._replaced_bytes(func, args)
        found = None if has_values else unknown_shapes.answer(func, args, kwargs)
        if found is None:
            found = func(*args, **kwargs)
        else:
            self.note_unknown_shape()
        if func is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default:
            self._of_infinities.add(args[1].untyped_storage()._cdata)
        self.operation += 1
        for each in _tensors(found):
            if each.device.type != "meta":
                self._enter(each.untyped_storage())
        self._look(self._working_bytes(func, args, kwargs, found) - replaced_bytes, _described(func, found))
        if self._at is not None and self.operation in self._at_operations:
            self._at(False)
        return found

    def note_unknown_shape(self) -> None:
        """Note that a result was given a shape which depends on values."""
        self.answered.add("the shape of a result")

    def _replaced_bytes(self, operation: Any, arguments: tuple[Any, ...]) -> int:
        """Return the size of a gradient to which the engine adds another one.

        It adds in place if nothing else holds the gradient and it is no tensor of a subclass, nor under a mode, as all
        are here (torch, csrc/autograd/input_buffer.cpp: ``can_accumulate_inplace``). Then the sum is a new tensor here
        only, and the gradient dies at once.
        """
        if operation is not torch.ops.aten.add.Tensor or not _is_called_by_engine():
            return 0
        first, second = arguments[:2]
        if not isinstance(second, torch.Tensor) or (first.dtype, first.shape) != (second.dtype, second.shape):
            return 0
        storage = first.untyped_storage()
        # One reference is the tensor's, the other that of the storage asked for here.
        is_held_elsewhere = torch._C._storage_Use_Count(storage._cdata) > 2
        is_whole = storage.nbytes() == first.numel() * first.element_size()
        return self.sizes.get(storage._cdata, 0) if is_whole and not is_held_elsewhere else 0

    def _answer(self, tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata in self._of_infinities:
            return 0.0  # no gradient is infinite, else the step would be left out
        return 1.0 if tensor.is_floating_point() else 1

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Strike out what is in no memory of the process's own, such as pages of a file."""
        for tensor in tensors:
            self.lend(tensor.untyped_storage())

    def lend(self, storage: torch.UntypedStorage) -> None:
        """Do not count a storage: a file lends it its pages."""
        self._strike_out(storage._cdata)
        self._left_out[storage._cdata] = weakref.ref(storage, functools.partial(self._forget, storage._cdata))

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that no operation made, or one that was lent."""
        self._left_out.pop(storage._cdata, None)
        self._enter(storage)
        self._look(0)

    def _forget(self, key: int, _: Any) -> None:
        self._left_out.pop(key, None)

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._left_out:
            return
        size = self._size_of(storage.nbytes())
        before = self.sizes.get(key)
        if before == size:
            return
        if before is None:
            self._alive[key] = weakref.ref(storage, lambda _: self._strike_out(key))
        self.sizes[key] = size
        self.live_bytes += size - (before or 0)

    def _strike_out(self, key: int) -> None:
        self.live_bytes -= self.sizes.pop(key, 0)
        self._alive.pop(key, None)

    def _look(self, working_bytes: int, what: tuple[Any, ...] | None = ()) -> None:
        if self._is_fused:
            return
        held = self.live_bytes + working_bytes
        if self._timeline is not None and what is not None:
            self._timeline.append(Moment(self._part, what, held))
        part = self._span.parts.get(self._part)
        if part is None:
            part = self._span.parts[self._part] = Peak()
        for peak in (self._span.whole, part):
            if held > peak.bytes:
                peak.bytes, peak.operation = held, self.operation

    def count_for_a_moment(self, size_bytes: int) -> None:
        """Count bytes that are alive beside all others now, and no longer."""
        self._look(size_bytes)

    @property
    def current_part(self) -> str:
        return self._part

    @contextlib.contextmanager
    def looking(self, at: Callable[[bool], None], operations: frozenset[int]) -> Iterator[None]:
        """Call ``at`` at some operations, and with true at the end of each part, while this context lasts."""
        self._at, self._at_operations = at, operations
        try:
            yield
        finally:
            self._at = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Moment]]:
        """Record each moment of what runs in this context."""
        self._timeline = []
        try:
            yield self._timeline
        finally:
            self._timeline = None

    @contextlib.contextmanager
    def span(self) -> Iterator[Span]:
        """Find the peaks of what runs in this context."""
        before, self._span = self._span, Span(self.operation)
        self._look(0)
        try:
            yield self._span
        finally:
            self._look(0)
            self._span = before

    @contextlib.contextmanager
    def without_temporaries(self) -> Iterator[None]:
        """Count only what is alive when this context ends, of all that runs in it."""
        before, self._is_fused = self._is_fused, True
        try:
            yield
        finally:
            self._is_fused = before
            self._look(0)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out what runs in this context: a measured process makes no storage for it."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Mark a part of a step."""
        before, self._part = self._part, name
        self._look(0)
        try:
            yield
        finally:
            self._look(0)
            if self._at is not None:
                self._at(True)
            self._part = before


def _is_called_by_engine() -> bool:
    """Return whether autograd's engine called the ledger, and not a function written in Python."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("__torch_dispatch__", "_fn", "inner"):  # how torch wraps it
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _described(operation: Any, found: Any) -> tuple[Any, ...] | None:
    """Return an operation with the size of its result; lists of tensors are as long as the model is deep.

    ``None`` for what only asks something of a tensor.
    """
    if isinstance(found, torch.Tensor):
        return operation, found.numel() * found.element_size()
    return (operation,) if found is None or isinstance(found, list | tuple) else None


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _tensors(each)
