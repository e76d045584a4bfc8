"""Finding plug-ins through entry points, and creating them with their options checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from membench.errors import PluginError, did_you_mean
from membench.plugins import Model, Options, Technique, Workload

KINDS = ("model", "technique", "workload")
CONTRACT: Mapping[str, type[Options]] = {"model": Model, "technique": Technique, "workload": Workload}


def registered(kind: str) -> dict[str, EntryPoint]:
    """The entry points of a kind by name. Nothing is imported."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"membench.{kind}s"):
        other = found.get(entry.name)
        if other is not None and other.value != entry.value:
            raise PluginError(f"two plug-ins are named {kind} '{entry.name}': {other.value} and {entry.value}")
        found[entry.name] = entry
    return found


def load_class(kind: str, entry: EntryPoint) -> type[Options]:
    """Import a plug-in and check it against its contract."""
    had_torch = "torch" in sys.modules
    try:
        loaded = entry.load()
    except Exception as error:
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) cannot be loaded: {error}") from error
    if "torch" in sys.modules and not had_torch:
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) imports torch when loaded; import it in the methods")
    if not (isinstance(loaded, type) and issubclass(loaded, CONTRACT[kind])):
        raise PluginError(f"{kind} '{entry.name}' ({entry.value}) is no subclass of membench.plugins.{kind.title()}")
    return loaded


def names(kind: str) -> Iterator[tuple[str, str]]:
    """Every name of a kind, presets too, with its first docstring line."""
    for name, entry in sorted(registered(kind).items()):
        loaded = load_class(kind, entry)
        line = (loaded.__doc__ or "").strip().partition("\n")[0]
        yield name, line
        for preset in loaded.presets:
            yield f"{name}-{preset}", line


def find(kind: str, name: str) -> tuple[type[Options], dict[str, Any]]:
    """The class behind a name and the options its preset sets.

    Raises:
        PluginError: for an unknown name, with the nearest known one.
    """
    entries = registered(kind)
    if name in entries:
        return load_class(kind, entries[name]), {}
    for family, entry in entries.items():
        if name.startswith(f"{family}-"):
            loaded = load_class(kind, entry)
            preset = loaded.presets.get(name.removeprefix(f"{family}-"))
            if preset is not None:
                return loaded, dict(preset)
    raise PluginError(f"no {kind} is named '{name}'; {did_you_mean(name, (n for n, _ in names(kind)))}")


def create(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """A plug-in with its options checked.

    Raises:
        PluginError: for an unknown name or option or a value that does not fit, in one line.
    """
    loaded, preset = find(kind, name)
    try:
        return loaded.model_validate({**preset, **options}, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, loaded.model_fields)
            raise PluginError(f"{kind} '{name}' has no option '{key}'; {hint}") from None
        raise PluginError(f"{kind} '{name}', option '{key}' = {first['input']!r}: {first['msg']}") from None
