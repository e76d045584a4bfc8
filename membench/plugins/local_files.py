"""Plug-ins without packaging: a Python file beside a suite, whose classes are plug-ins."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from membench.errors import PluginError, place_in, summary
from membench.plugins import Options, QualityMetric
from membench.protocol.case import PluginFile
from membench.records.names import checked_name
from membench.records.validation import shown

BESIDE_A_SUITE = "membench_plugins.py"
"""The file that is used without being named, if it lies in a suite's folder."""

_TORCH = ("torch", "transformers", "torchao", "peft", "accelerate", "bitsandbytes")
_UNTYPED = re.compile(r"non-annotated attribute was detected: `(\w+) = (.*?)`\.")


def named(paths: Sequence[str], folder: Path) -> tuple[PluginFile, ...]:
    """The plug-in files of a suite: the one that lies beside it, then those that it names.

    Args:
        paths: as the suite has them, relative to it.
        folder: of the suite.

    Raises:
        PluginError: if one is missing or no file: its path, and what is wrong with it.
    """
    found = {name: _path(name, folder) for name in paths}
    beside = folder / BESIDE_A_SUITE
    if beside.is_file() and beside.resolve() not in found.values():
        found = {BESIDE_A_SUITE: beside.resolve()} | found
    return tuple(PluginFile(name, str(path), _sha256(_source(name, path))) for name, path in found.items())


def _path(name: str, folder: Path) -> Path:
    try:
        path = (folder / name).resolve()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a character that names have not
        raise PluginError(f"{shown(name)} leads to no file") from None
    if is_folder:
        raise PluginError(f"'{name}' is a folder; name a Python file")
    if not is_file:
        raise PluginError(f"'{name}': there is no such file in {path.parent}")
    if path.suffix != ".py":
        raise PluginError(f"'{name}' is no Python file; its name must end in .py")
    return path


def classes(file: PluginFile) -> Iterator[tuple[str, type[Options]]]:
    """The plug-ins of a file by name. It is run once in a process.

    A class that is defined there and whose own name begins with no underscore is a plug-in. It is called what its
    ``name: ClassVar[str]`` says, else by its own name: ``HalfFeedForward`` is ``half-feed-forward``, and a quality
    metric ``half_feed_forward``.

    Raises:
        PluginError: if the file cannot be run, imports torch, or has changed since it was named: file and line.
    """
    module = _module(file)
    for attribute, value in vars(module).items():
        if not (isinstance(value, type) and issubclass(value, Options)):
            continue
        if value.__module__ == module.__name__ and value.__name__ == attribute and not attribute.startswith("_"):
            own = vars(value).get("name")
            try:
                yield checked_name(own) if isinstance(own, str) else _named_after(value), value
            except ValueError as error:
                where = f"{file.name}, line {line_of(value)}"
                raise PluginError(f"{where}: class {attribute} is named {shown(own)}: {error}") from None


def line_of(loaded: type[Options]) -> int | None:
    """The line of its file in which a class begins."""
    path = sys.modules[loaded.__module__].__file__
    tree = ast.parse(Path(str(path)).read_bytes())
    return next((n.lineno for n in tree.body if isinstance(n, ast.ClassDef) and n.name == loaded.__name__), None)


def fingerprints(files: Sequence[PluginFile]) -> dict[str, str]:
    """The SHA-256 of each file, by its name in the suite."""
    return {file.name: file.sha256 for file in files}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which files are not what they were, in words."""
    return [
        f"{name} " + ("has changed" if name in before and name in now else "is new" if name in now else "is gone")
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _named_after(loaded: type[Options]) -> str:
    """A class's name in the case of its kind: metrics stand in rules, where a hyphen is a minus."""
    words = re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", loaded.__name__)
    return ("_" if issubclass(loaded, QualityMetric) else "-").join(words).lower()


def _module(file: PluginFile) -> ModuleType:
    # A name that no other module has, and that is another one once the file has been edited.
    key = hashlib.sha256(f"{file.path}\0{file.sha256}".encode()).hexdigest()[:16]
    name = f"membench_plugin_file_{key}"
    if name in sys.modules:
        return sys.modules[name]
    source = _source(file.name, Path(file.path))
    if _sha256(source) != file.sha256:
        raise PluginError(f"{file.name} has changed since the run began")
    try:
        tree = ast.parse(source, file.path)
        code = compile(tree, file.path, "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise PluginError(f"{file.name}{where}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise PluginError(f"{file.name} cannot be read as Python: {summary(error)}") from None
    for line, imported in _imports_at_load(tree.body):
        if imported.partition(".")[0] in _TORCH:
            raise PluginError(f"{file.name}, line {line}: imports {imported} when it is loaded; do so in the methods")
    spec = importlib.util.spec_from_file_location(name, file.path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    had_torch = "torch" in sys.modules
    sys.modules[name] = module  # classes and their pickles look for it there
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a machine may read what we print
            exec(code, vars(module))
        if "torch" in sys.modules and not had_torch:
            raise PluginError(f"{file.name}: what it imports loads torch; import that in the methods")
    except PluginError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(f"{file.name}{place_in(error, file.path)}: {said(error)}") from None
    return module


def said(error: BaseException) -> str:
    """What went wrong when a plug-in's module was loaded, in the words of whoever wrote it."""
    untyped = _UNTYPED.search(str(error))
    if untyped is None:
        return summary(error)
    name, value = untyped.groups()
    return f"option '{name}' has no type: write '{name}: TYPE = {value}', or ClassVar[TYPE] if it is no option"


def _imports_at_load(body: Sequence[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and module of what is imported when statements are run; not in functions, nor for types alone."""
    for node in body:
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from _imports_at_load(node.orelse)
            case ast.If() | ast.Try() | ast.With() | ast.ClassDef():
                for inner in ("body", "orelse", "handlers", "finalbody"):
                    yield from _imports_at_load(getattr(node, inner, []))
            case ast.ExceptHandler():
                yield from _imports_at_load(node.body)


def _source(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PluginError(f"'{name}' cannot be read: {error.strerror}") from None


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()
