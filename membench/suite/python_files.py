"""Running of users' Python files that make suites, in the parent process, which measures nothing."""

from __future__ import annotations

import ast
import contextlib
import math
import os
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from membench.errors import MembenchError, SuiteError, place_in, summary

_T = TypeVar("_T")
_DEEPEST = 5


def execute(path: Path) -> tuple[dict[str, Any], str]:
    """Run a file and return its global variables and its text. It can import modules next to it, like a script.

    Raises:
        SuiteError: if it cannot be read, raises an error or imports torch: file, line and what is wrong.
    """
    text, _, code = _parsed(path)
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path.absolute())}
    had_torch = "torch" in sys.modules
    try:
        # Its output must not mix with tables on standard output.
        with _importing_from(path.parent), contextlib.redirect_stdout(sys.stderr):
            exec(code, namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, SuiteError) and str(error).startswith(f"{path}: "):
            raise
        message = str(error) if isinstance(error, MembenchError) else summary(error)
        raise SuiteError(f"{path}{place_in(error, str(path))}: {message}") from None
    if "torch" in sys.modules and not had_torch:
        raise SuiteError(
            f"{path} imports torch, itself or through what it imports; a suite names what is measured,"
            " and the process that reads it stays small"
        )
    return namespace, text


def docstring(path: Path) -> str | None:
    """Return the docstring of a file without running it; ``None`` if it has none.

    Raises:
        SuiteError: if it cannot be read or parsed.
    """
    _, tree, _ = _parsed(path)
    return ast.get_docstring(tree)


def _parsed(path: Path) -> tuple[str, ast.Module, CodeType]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        tree = ast.parse(text, str(path))
        return text, tree, compile(tree, str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise SuiteError(f"{path}{where}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # wrong encoding, or nested too deeply
        raise SuiteError(f"{path}: {summary(error)}") from None


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    entry = os.path.abspath(folder)
    if entry in sys.path:
        yield
        return
    sys.path.append(entry)  # last: a file in it must not replace a module of the standard library
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def instances_in(values: Iterable[Any], kind: type[_T], depth: int = 0) -> Iterator[_T]:
    """Yield the instances of a type among values, and in lists, tuples and dicts among them."""
    for value in list(values):
        if isinstance(value, kind):
            yield value
        elif isinstance(value, list | tuple | dict) and depth < _DEEPEST:
            yield from instances_in(value.values() if isinstance(value, dict) else value, kind, depth + 1)


def as_toml(value: Any, key: str) -> Any:
    """Convert a value to the types that TOML has.

    Args:
        key: the name of the value in error messages.

    Raises:
        ValueError: if TOML cannot represent it: key and what is wrong.
    """
    match value:
        case float() if not math.isfinite(value):
            raise ValueError(f"{key} = {value}: expected a finite number")
        case str() | bool() | int() | float() | None:
            return value
        case Mapping():
            odd = next((name for name in value if not isinstance(name, str)), None)
            if odd is not None:
                raise ValueError(f"{key}: {odd!r} is a key, and must be text")
            return {name: as_toml(inner, f"{key}.{name}") for name, inner in value.items()}
        case list() | tuple() | range():
            return [as_toml(inner, f"{key}.{number}") for number, inner in enumerate(value)]
        case Path():
            return str(value)
    raise ValueError(f"{key}: a suite holds text, numbers, true or false, lists and tables, not {type(value).__name__}")
