"""Marks of phases in a user's program, for ``membench run --script``."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing import Self

CHANNEL_VARIABLE = "MEMBENCH_PHASES"
"""The environment variable with the id of the process that may mark phases, and its socket's descriptor: '1234:5'."""

_F = TypeVar("_F", bound=Callable[..., Any])
_NOT_DONE_WHEN_CALLED = 0x20 | 0x80 | 0x200  # code flags of generators, coroutines and asynchronous generators


class phase(contextlib.ContextDecorator):
    """Mark a phase of this program: ``with membench.phase("load"):``, or ``@membench.phase("load")`` above a function.

    ``membench run --script`` measures each marked phase. Phases may be nested: ``step`` inside ``train`` is reported as
    ``train.step``. They may repeat: durations are added, and the peak is the maximum. Only the process that membench
    started marks phases, in any of its threads; its child processes do not.

    Without ``membench run --script`` a mark has no effect.

    Raises:
        TypeError: if the name is not a string, or the decorated function is a coroutine or a generator, which does its
            work after the call.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a phase is text, not {name!r}")
        self._name = name

    def __call__(self, func: _F) -> _F:
        if getattr(getattr(func, "__code__", None), "co_flags", 0) & _NOT_DONE_WHEN_CALLED:
            raise TypeError(f"{func.__qualname__} does nothing yet when it is called; mark the phase with 'with' in it")
        return super().__call__(func)

    def __enter__(self) -> Self:
        if _CHANNEL is not None:
            _CHANNEL.enter(self._name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if _CHANNEL is not None:
            _CHANNEL.leave(None if kind is None else kind.__name__)


class _Channel:
    """The socket to the runner; each mark waits until the runner has read the memory at the boundary."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self._pid, self._descriptor = pid, descriptor
        self._lock = threading.Lock()
        self._names: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("names", default=())
        os.set_inheritable(descriptor, False)

    def enter(self, name: str) -> None:
        """Send that a phase begins in the current context."""
        names = (*self._names.get(), name)
        self._names.set(names)
        self._send(names, event="enter")

    def leave(self, raised: str | None) -> None:
        """Send that the innermost phase ends; ``raised`` is the type of the exception that ended it."""
        names = self._names.get()
        self._names.set(names[:-1])
        self._send(names, event="leave", raised=raised)

    def _send(self, names: tuple[str, ...], **message: str | None) -> None:
        if os.getpid() != self._pid:  # in a forked child of the program
            return
        import json

        left = json.dumps({**message, "phase": ".".join(names)}).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # the runner has ended
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.read(self._descriptor, 16)


def _open_channel() -> _Channel | None:
    pid, _, descriptor = os.environ.get(CHANNEL_VARIABLE, "").partition(":")
    # A child process has another id; the descriptor may refer to another file there.
    return _Channel(os.getpid(), int(descriptor)) if pid == str(os.getpid()) else None


_CHANNEL = _open_channel()
