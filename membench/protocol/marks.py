"""Marks of phases in a user's own program, for whoever measures it: ``membench run --script``."""

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
"""Of the environment: the id of the process that may mark phases, and the socket on which it does: '1234:5'."""

_F = TypeVar("_F", bound=Callable[..., Any])
_NOT_DONE_WHEN_CALLED = 0x20 | 0x80 | 0x200  # code flags of generators, coroutines and asynchronous generators


class phase(contextlib.ContextDecorator):
    """A phase of this program: ``with membench.phase("load"):``, or ``@membench.phase("load")`` above a function.

    ``membench run --script`` measures each phase that the program marks. Phases may lie in each other, ``train`` and
    in it ``step`` being ``train.step``, and come again: then the durations are added up, and the peak is the highest.
    Only the process that membench started marks phases, in any of its threads; its children do not.

    Where nothing is measured it does nothing.

    Raises:
        TypeError: if the name is no text, or what is decorated does its work after the call (coroutines, generators).
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
    """Tells of phases, and waits each time until what was read from outside falls on the boundary."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self._pid, self._descriptor = pid, descriptor
        self._lock = threading.Lock()
        self._names: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("names", default=())
        os.set_inheritable(descriptor, False)

    def enter(self, name: str) -> None:
        names = (*self._names.get(), name)
        self._names.set(names)
        self._tell(names, event="enter")

    def leave(self, raised: str | None) -> None:
        names = self._names.get()
        self._names.set(names[:-1])
        self._tell(names, event="leave", raised=raised)

    def _tell(self, names: tuple[str, ...], **message: str | None) -> None:
        if os.getpid() != self._pid:  # a fork of the program
            return
        import json

        left = json.dumps({**message, "phase": ".".join(names)}).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # whoever measured has gone
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.read(self._descriptor, 16)


def _opened() -> _Channel | None:
    pid, _, descriptor = os.environ.get(CHANNEL_VARIABLE, "").partition(":")
    # A child has another id: what it has under that descriptor is something else.
    return _Channel(os.getpid(), int(descriptor)) if pid == str(os.getpid()) else None


_CHANNEL = _opened()
