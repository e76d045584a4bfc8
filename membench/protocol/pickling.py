"""Pickling of functions for a process that did not define them."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
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
    return _pickled(_Pickler, value, by_value)


def as_bytes_for_origin(value: Any) -> bytes:
    """Pickle a value for the process that has sent its functions and classes here, which finds its own by name.

    Raises:
        Exception: of any type, if the value cannot be pickled.
    """
    return _pickled(_PicklerForOrigin, value, ())


def _pickled(pickler: type[_Pickler], value: Any, by_value: Iterable[types.ModuleType]) -> bytes:
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
        pickler(file).dump(value)
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


class _PicklerForOrigin(_Pickler):
    """Names functions and classes of modules that are known only where they came from, and adds a copy."""

    def reducer_override(self, value: Any) -> Any:
        reduced = _reduce_by_name(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced


def let_children_find_functions() -> None:
    """Let processes that multiprocessing spawns find functions and classes that they cannot import.

    A spawned process imports what it is sent by name, and so misses what was sent here from another process, and
    modules that were loaded from a file outside the import path.
    """
    from multiprocessing.reduction import ForkingPickler

    # The pickler of all of multiprocessing: other modules hold it, so that a subclass would not reach them.
    ForkingPickler.reducer_override = lambda _, value: _reduce_by_name(value)  # type: ignore[method-assign]


def _reduce_by_name(value: Any) -> Any:
    """Reduce a function or class that cannot be imported to its name and a copy; the pickler reduces others."""
    if not isinstance(value, types.FunctionType | type):
        return NotImplemented
    module, name = getattr(value, "__module__", None), value.__qualname__
    if not isinstance(module, str) or "<" in name or module in ("builtins", "__main__", "__mp_main__"):
        return NotImplemented
    is_here = _named(module, name) is value
    if is_here and _can_be_imported(module.partition(".")[0]):
        return NotImplemented
    return _found_or_copied, (module, name, as_bytes(value, [sys.modules[module]] if is_here else ()))


@functools.cache
def _can_be_imported(module: str) -> bool:
    """Whether a new process can import a module of the top level, as far as the finders know."""
    for finder in sys.meta_path:
        with contextlib.suppress(Exception):
            if finder.find_spec(module, None) is not None:
                return True
    return False


def _found_or_copied(module: str, name: str, copy: bytes) -> Any:
    """Return the function or class of a name if its module is loaded here, else the copy."""
    found = _named(module, name)
    if found is not None:
        return found
    let_children_find_functions()
    return pickle.loads(copy)


def _named(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
