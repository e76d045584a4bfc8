"""Lists of the available models, techniques, workloads, metrics and suites, as text. This module imports no torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from membench.errors import SuiteError, did_you_mean, one_line
from membench.plugins import Options, Parallel, QualityMetric, Technique, registry
from membench.plugins.local_files import BESIDE_A_SUITE
from membench.protocol.case import PluginFile
from membench.suite import lookup
from membench.suite.loading import description

KINDS = ("models", "techniques", "workloads", "metrics", "suites")
"""The kinds that can be listed, in the order of the full list."""

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "table",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} long",
}


def overview(kinds: tuple[str, ...] = KINDS) -> Iterator[str]:
    """Yield a line for each model, technique, workload, quality metric and suite; for broken ones with the error.

    Plug-in files in the current folder and in ./suites are named and not run: they are loaded for suites beside them.
    """
    for kind in kinds:
        yield kind
        yield from _columns(list(_suites() if kind == "suites" else _families(kind.removesuffix("s"))))
    here = [folder / BESIDE_A_SUITE for folder in (Path.cwd(), Path.cwd() / "suites")]
    files = [path for path in here if path.is_file()]
    if files:
        yield "plug-in files"
        yield from _columns([(str(path), "loaded for the suites beside it alone") for path in files])


def _suites() -> Iterator[tuple[str, ...]]:
    for name, suite in lookup.named().items():
        try:
            yield name, suite.origin, description(suite.path())
        except SuiteError as error:
            yield name, suite.origin, f"broken: {error}"


def _families(kind: str) -> Iterator[tuple[str, ...]]:
    for family in registry.families(kind):
        if family.loaded is None:
            yield family.name, f"{'ambiguous' if family.is_ambiguous else 'broken'}: {family.error}"
            continue
        presets = f"-{{{','.join(family.loaded.presets)}}}" if family.loaded.presets else ""
        first = _doc(family.loaded).partition("\n")[0]
        if issubclass(family.loaded, Technique):
            yield family.name + presets, f"on {family.loaded.acts_on}", f"runs on {_devices(family.loaded)}", first
        elif issubclass(family.loaded, QualityMetric):
            unit = f"in {family.loaded.unit}, " if family.loaded.unit else ""
            yield family.name + presets, f"{unit}{family.loaded.better} is better", first
        else:
            yield family.name + presets, first


def _devices(technique: type[Technique]) -> str:
    """Return the devices that a technique runs on, with a count where it spreads a case over several."""
    many = "2x" if issubclass(technique, Parallel) else ""
    return ", ".join(f"{many}{device}" for device in technique.devices) + (", …" if many else "")


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Format rows in aligned columns; the last column is not padded."""
    lengths = {len(row) for row in rows}
    widths = {
        (length, column): max(len(row[column]) for row in rows if len(row) == length or column == 0)
        for length in lengths
        for column in range(length - 1)
    }
    for row in rows:
        padded = [cell.ljust(widths[len(row), column]) for column, cell in enumerate(row[:-1])]
        yield one_line("  " + "  ".join([*padded, row[-1]])).rstrip()


def details(name: str, files: Sequence[PluginFile] = ()) -> Iterator[str]:
    """Yield the docstrings and options of all plug-ins of a name, of any kind.

    Args:
        files: the plug-in files of a suite, which are run.

    Raises:
        PluginError: if one of them is broken.
        SuiteError: if there is none; the message suggests the closest known name.
    """
    kinds = [kind for kind in registry.KINDS if registry.is_taken(kind, name, files)]
    if not kinds:
        known = [
            *KINDS,
            *lookup.named(),
            *(found for kind in registry.KINDS for found in registry.names(kind, files)),
        ]
        raise SuiteError(f"nothing is named '{name}'; {did_you_mean(name, known)}")
    for number, kind in enumerate(kinds):
        loaded, preset, _ = registry.find(kind, name, files)
        if number:
            yield ""
        yield f"{kind} {name}"
        yield ""
        yield from (one_line(f"  {line}").rstrip() for line in _doc(loaded).split("\n"))
        yield ""
        if issubclass(loaded, Technique):
            yield f"  acts on  {loaded.acts_on}"
            yield f"  runs on  {_devices(loaded)}"
            for module, distribution in loaded.needs.items():
                there = "installed" if importlib.util.find_spec(module) else f"pip install '{distribution}'"
                yield f"  needs    {module}: {there}"
        yield from _options(loaded, preset)


def _options(loaded: type[Options], preset: dict[str, Any]) -> Iterator[str]:
    schema = loaded.model_json_schema()
    wanted, explained = set(schema.get("required", ())), _explanations(loaded)
    rows: list[tuple[str, ...]] = []
    for option, form in schema.get("properties", {}).items():
        if option in preset:
            value = f"{_written(preset[option])}, by its name"
        elif option in wanted:
            value = "must be given"
        else:
            value = f"default {_written(form.get('default'))}"
        rows.append((option, _type(form, schema.get("$defs", {})), value, explained.get(option, "")))
    yield "  options" if rows else "  no options"
    yield from (f"  {line}" for line in _columns(rows))


def _type(form: dict[str, Any], shared: dict[str, Any]) -> str:
    """Describe a JSON schema in words: 'whole number, at least 1'."""
    if "$ref" in form:
        form = {**shared[form["$ref"].rpartition("/")[2]], **form}
    if "enum" in form or "const" in form:
        return " or ".join(_written(value) for value in form.get("enum", [form.get("const")]))
    if "anyOf" in form:
        return " or ".join(_type(inner, shared) for inner in form["anyOf"] if inner.get("type") != "null")
    if form.get("type") == "array":
        return f"list of {_type(form.get('items', {}), shared)}"
    bounds = [text.format(form[key]) for key, text in _BOUNDS.items() if key in form]
    return ", ".join([_TYPES.get(form.get("type", ""), "any value"), *bounds])


def _written(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _doc(loaded: type[Options]) -> str:
    # Its own docstring only: an inherited one would describe the base class.
    return inspect.cleandoc(loaded.__dict__.get("__doc__") or "")


def _explanations(loaded: type[Options]) -> dict[str, str]:
    """Return the strings below the options in the source of a class and of its base classes, by option."""
    found: dict[str, str] = {}
    for owner in reversed(loaded.__mro__):
        if not (issubclass(owner, Options) and owner is not Options):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError, SyntaxError):  # the class was made at run time, or its source is missing
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=option)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[option] = " ".join(text.split())
    return found
