"""Functions as bytes, for a process that did not define them."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import cloudpickle


def as_bytes(value: Any, by_value: Iterable[types.ModuleType]) -> bytes:
    """What ``pickle`` can read anywhere the same libraries are: functions, lambdas and local ones, too.

    Args:
        by_value: modules that cannot be imported there: what is defined in them is sent as it is. What is defined in
            others is sent by its name.

    Raises:
        Exception: of whatever kind, if something in it cannot be sent.
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


def _reduced(code: types.CodeType) -> tuple[Any, ...]:
    return _code, (*cloudpickle.Pickler.dispatch_table[types.CodeType](code)[:2], code.co_filename)


def _code(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], file: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=file)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps the names of source files, which the library leaves out: a traceback without them helps nobody."""

    dispatch_table: ClassVar[Any] = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: _reduced})
