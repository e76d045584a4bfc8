"""How libraries say that memory ran out: exceptions have no common type for it, and programs no common word."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from membench.host import last_words

_TYPES = ("MemoryError", "OutOfMemoryError", "ResourceExhaustedError")
_FROM_LIBRARIES = (RuntimeError, OSError, SystemError)
"""Types by which libraries in C and C++ raise; the messages of other types may quote any words."""
_RELAYING = re.compile(
    r"ChildFailedError|ProcessRaisedException|CalledProcessError|RayTaskError|_?RemoteTraceback|RemoteError|SystemExit"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, the cause that it names, or an exception of its group means that memory ran out.

    An error that came up while another was handled is one of its own.
    """
    return any(map(_is_out_of_memory, _with_causes(error)))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left = [error]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        left += [each.__cause__] if each.__cause__ is not None else []
        left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _is_out_of_memory(error: BaseException) -> bool:
    if any(kind.__name__ in _TYPES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if _RELAYING.fullmatch(type(error).__name__):
        return any(last_words.of(text).are_of_memory for text in _texts_of(error))
    return isinstance(error, _FROM_LIBRARIES) and last_words.tell_of_memory(_text(error))


def _texts_of(error: BaseException) -> Iterator[str]:
    """Yield what an error says of another process: its message, and the output of that process."""
    yield _text(error)
    for name in ("stderr", "output"):
        text = getattr(error, name, None)
        if isinstance(text, bytes | str) and text:
            yield text if isinstance(text, str) else text.decode(errors="replace")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # its own __str__ fails
        return ""
