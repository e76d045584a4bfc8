"""Exceptions on their way to another process, which can catch them as if it had called the function itself.

Python pickles an exception as its class and ``args``, and calls the class with them; that fails, or makes another
message, if its ``__init__`` takes other arguments. Here an exception is sent in parts, and put together without calling
anything of its own. A part that cannot be sent is replaced by its text.
"""

from __future__ import annotations

import contextlib
import pickle
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from membench.protocol import pickling

_LONGEST_TEXT = 2000
_LONGEST_CHAIN = 50
_OWN_PICKLING = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__setstate__")
_LEFT_OUT = ("__suppress_context__", "message", "exceptions", "obj")
"""Members that are sent on their own, and the object whose attribute is missing, which may be of any size."""


@dataclass(frozen=True)
class Value:
    """A part of an exception: pickled if that is possible, and as text."""

    pickled: bytes | None
    shown: str
    text: str


class NotSent:
    """Stands for a part of an exception that could not be sent; it reads like that part."""

    def __init__(self, shown: str, text: str) -> None:
        self._shown, self._text = shown, text

    def __repr__(self) -> str:
        return self._shown

    def __str__(self) -> str:
        return self._text


@dataclass(frozen=True)
class SentException:
    """An exception in parts.

    Attributes:
        whole: the exception in the way in which its class says that it is pickled, if it says so.
        classes: its class and the bases of that, the nearest first.
        attributes: the entries of its ``__dict__``, its notes among them.
        members: attributes in slots, and those that Python's own exceptions keep besides ``args``.
        args: its arguments; ``None`` for that with the exceptions of a group.
        context: ``None`` also if it is the cause.
        group: the exceptions of a group, and ``message`` that of the group.
    """

    whole: bytes | None
    classes: Sequence[Value]
    args: Sequence[Value | None]
    attributes: dict[str, Value]
    members: dict[str, Value]
    suppresses_context: bool
    cause: SentException | None = None
    context: SentException | None = None
    group: Sequence[SentException] = field(default=())
    message: str = ""


@dataclass(frozen=True)
class Raised:
    """What a function raised in its process: the exception, and the text of its traceback there."""

    error: SentException
    traceback: str


def sent(error: BaseException) -> SentException:
    """Take an exception apart, with its causes, to be sent to the process that sent the function."""
    parts = _sent(error, set())
    assert parts is not None, "the first is not too many"
    return parts


def _sent(error: BaseException | None, seen: set[int]) -> SentException | None:
    if error is None or id(error) in seen or len(seen) == _LONGEST_CHAIN:
        return None
    seen.add(id(error))
    kind = type(error)
    members_of_group, message = (error.exceptions, error.message) if isinstance(error, BaseExceptionGroup) else ((), "")
    members = {name: getattr(error, name, None) for name in _members(kind) if name not in _LEFT_OUT}
    group = [_sent(each, seen) for each in members_of_group]
    return SentException(
        whole=_value(error).pickled if _has_own_pickling(kind) else None,
        classes=[_value(each) for each in kind.__mro__ if issubclass(each, BaseException)],
        args=[None if members_of_group and _are(each, members_of_group) else _value(each) for each in error.args],
        attributes={name: _value(each) for name, each in vars(error).items()},
        members={name: _value(each) for name, each in members.items() if each is not None},
        suppresses_context=error.__suppress_context__,
        cause=_sent(error.__cause__, seen),
        context=_sent(error.__context__, seen),
        group=[each for each in group if each is not None],
        message=message,
    )


def _are(value: Any, exceptions: Sequence[BaseException]) -> bool:
    return isinstance(value, list | tuple) and list(map(id, value)) == list(map(id, exceptions))


def put_together(parts: SentException) -> BaseException:
    """Make the exception again, with its class, or the nearest base class that is known here."""
    error = _whole(parts) or _made(parts)
    error.__cause__ = None if parts.cause is None else put_together(parts.cause)
    error.__context__ = error.__cause__ if parts.context is None else put_together(parts.context)
    error.__suppress_context__ = parts.suppresses_context
    return error


def _whole(parts: SentException) -> BaseException | None:
    with contextlib.suppress(Exception):  # its own way of pickling fails
        found = pickle.loads(parts.whole or b"")
        if isinstance(found, BaseException):
            if (notes := parts.attributes.get("__notes__")) is not None:
                found.__notes__ = _loaded(notes)
            return found
    return None


def _made(parts: SentException) -> BaseException:
    kind: Any = next(found for each in parts.classes if isinstance(found := _loaded(each), type))
    group = [put_together(each) for each in parts.group]
    args = tuple(group if each is None else _loaded(each) for each in parts.args)
    python_own: Any = next(each for each in kind.__mro__ if each.__module__ == "builtins")
    if group:
        error: BaseException = python_own.__new__(kind, parts.message, group)
    elif issubclass(kind, BaseExceptionGroup):  # in a chain that is too long
        error = RuntimeError(parts.message)
    else:
        error = python_own.__new__(kind, *args)
        with contextlib.suppress(Exception):  # made by hand with arguments that Python itself would refuse
            python_own.__init__(error, *args)
    error.args = args
    for name, value in (parts.attributes | parts.members).items():
        with contextlib.suppress(AttributeError, TypeError):  # read-only, or of a class that is not known here
            object.__setattr__(error, name, _loaded(value))
    return error


def _members(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        yield from (name for name, member in vars(each).items() if isinstance(member, types.MemberDescriptorType))


def _has_own_pickling(kind: type) -> bool:
    own = (each for each in kind.__mro__ if each.__module__ != "builtins")
    return any(name in vars(each) for each in own for name in _OWN_PICKLING)


def _value(value: Any) -> Value:
    try:
        pickled = pickling.as_bytes_for_origin(value)
    except Exception:
        pickled = None
    return Value(pickled, _text(repr, value), _text(str, value))


def _text(of: Any, value: Any) -> str:
    try:
        return str(of(value))[:_LONGEST_TEXT]
    except Exception:
        return f"<{type(value).__name__}>"


def _loaded(value: Value) -> Any:
    if value.pickled is not None:
        with contextlib.suppress(Exception):
            return pickle.loads(value.pickled)
    return NotSent(value.shown, value.text)
