"""Pickling of functions for a process that did not define them."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cloudpickle


@dataclass(frozen=True)
class FunctionCall:
    """A call of a function for a process that did not define it, with the surroundings that it runs in.

    Attributes:
        import_path: the caller's ``sys.path``.
        folder: the current folder.
        call: function, arguments and keyword arguments as ``as_bytes`` made them: unpickled after the path is set.
    """

    import_path: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    call: bytes


def as_bytes(value: Any, by_value: Iterable[types.ModuleType]) -> bytes:
    """Pickle a value, including lambdas and local functions, for any process with the same libraries.

    Args:
        by_value: modules that the other process cannot import: their functions and classes are pickled by value, all
            others by name.

    Raises:
        Exception: of any type, if the value cannot be pickled.
    """
    known = cloudpickle.list_registry_pickle_by_value()
    modules = {
        module.__name__: module
        for module in by_value
        if sys.modules.get(module.__name__) is module and module.__name__ not in known
    }
    for module in modules.values():
        cloudpickle.register_pickle_by_value(module)
    try:
        file = io.BytesIO()
        _Pickler(file).dump(value)
        return file.getvalue()
    finally:
        for module in modules.values():
            cloudpickle.unregister_pickle_by_value(module)


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    return _restore_code, (*cloudpickle.Pickler.dispatch_table[types.CodeType](code)[:2], code.co_filename)


def _restore_code(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], file: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=file)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps the names of source files, which cloudpickle drops; tracebacks need them."""

    dispatch_table: ClassVar[Any] = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: _reduce_code})
