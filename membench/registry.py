"""Finding plug-ins through entry points, and creating them with their options checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from membench.errors import PluginError, did_you_mean, summary
from membench.plugins import Model, Options, Technique, Workload
from membench.validation import problem, shown

KINDS = ("model", "technique", "workload")
CONTRACT: Mapping[str, type[Options]] = {"model": Model, "technique": Technique, "workload": Workload}

_importing_torch: set[str] = set()
"""Modules that were seen to import torch: the second time that it is loaded, a module imports nothing."""


@dataclass(frozen=True)
class Family:
    """A plug-in as it is registered, whether or not it can be loaded.

    Attributes:
        loaded: its class, or ``None`` if it is broken; ``error`` then says in what way, and of which distribution.
    """

    name: str
    loaded: type[Options] | None
    error: str | None


def _registered(kind: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a kind by name. Nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"membench.{kind}s"):
        same = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in same]:
            same.append(entry)
    return found


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _two(kind: str, name: str, entries: list[EntryPoint]) -> PluginError:
    whose = " and ".join(f"{_distribution(entry)} ({entry.value})" for entry in entries)
    return PluginError(f"{len(entries)} plug-ins are named {kind} '{name}': of {whose}; keep one of them installed")


def _broken(kind: str, entry: EntryPoint, how: str) -> PluginError:
    return PluginError(f"{kind} '{entry.name}' of {_distribution(entry)} ({entry.value}) {how}")


def _load(kind: str, name: str, entries: list[EntryPoint]) -> type[Options]:
    """Import the plug-in of a name and check it against its contract.

    Raises:
        PluginError: if it cannot be imported, keeps no contract, or there are two of the name.
    """
    if len(entries) > 1:
        raise _two(kind, name, entries)
    (entry,) = entries
    had_torch = "torch" in sys.modules
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:
        raise _broken(kind, entry, f"cannot be loaded: {summary(error)}") from error
    finally:
        if "torch" in sys.modules and not had_torch:
            _importing_torch.add(entry.module)
    if entry.module in _importing_torch:
        raise _broken(kind, entry, "imports torch when it is loaded; it must do so in its methods")
    if not (isinstance(loaded, type) and issubclass(loaded, CONTRACT[kind])):
        raise _broken(kind, entry, f"is no subclass of membench.plugins.{kind.title()}")
    return loaded


def families(kind: str) -> Iterator[Family]:
    """Every plug-in of a kind, broken ones too, by name."""
    for name, entries in sorted(_registered(kind).items()):
        try:
            yield Family(name, _load(kind, name, entries), None)
        except PluginError as error:
            yield Family(name, None, str(error))


def names(kind: str) -> list[str]:
    """Every name of a kind, presets too."""
    found = []
    for family in families(kind):
        presets = family.loaded.presets if family.loaded else ()
        found += [family.name, *(f"{family.name}-{preset}" for preset in presets)]
    return found


def is_taken(kind: str, name: str) -> bool:
    """Whether a plug-in or a preset of it has this name, broken ones too."""
    registered = _registered(kind)
    try:
        return name in registered or bool(_candidates(kind, name, registered))
    except PluginError:
        return False


def find(kind: str, name: str, also: Iterable[str] = ()) -> tuple[type[Options], dict[str, Any]]:
    """The class behind a name and the options its preset sets.

    Args:
        also: names to think of when saying what may have been meant.

    Raises:
        PluginError: for an unknown name, with the nearest known one; for a broken plug-in; for two of one name.
    """
    registered = _registered(kind)
    found = _candidates(kind, name, registered)
    if not found:
        raise PluginError(f"no {kind} is named '{name}'; {did_you_mean(name, [*names(kind), *also])}")
    if len(found) > 1:
        raise _two(kind, name, [entry for family, _, _ in found for entry in registered[family]])
    _, loaded, preset = found[0]
    return loaded, preset


def _candidates(
    kind: str, name: str, registered: Mapping[str, list[EntryPoint]]
) -> list[tuple[str, type[Options], dict[str, Any]]]:
    """Family, class and preset's options of whatever has a name."""
    found: list[tuple[str, type[Options], dict[str, Any]]] = []
    if name in registered:
        found.append((name, _load(kind, name, registered[name]), {}))
    for family, entries in registered.items():
        if not name.startswith(f"{family}-"):
            continue
        try:
            loaded = _load(kind, family, entries)
        except PluginError:
            if not found:
                raise
            continue
        preset = loaded.presets.get(name.removeprefix(f"{family}-"))
        if preset is not None:
            found.append((family, loaded, dict(preset)))
    return found


def create(kind: str, name: str, options: Mapping[str, Any], also: Iterable[str] = ()) -> Any:
    """A plug-in with its options checked: what TOML and JSON write as a whole number, text or a list must be one.

    Raises:
        PluginError: for an unknown name or option or a value that does not fit, in one line.
    """
    loaded, preset = find(kind, name, also)
    for option, value in preset.items():
        if options.get(option, value) != value:
            raise PluginError(
                f"{kind} '{name}' sets {option} = {shown(value)}: option '{option}' = {shown(options[option])}"
                " contradicts its name"
            )
    given = {**preset, **options}
    for option, value in given.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise PluginError(f"{kind} '{name}': option '{option}' = {shown(value)}: no option takes that") from None
    try:
        # As JSON, whose strict reading takes lists for tuples and text for paths, but no text for numbers.
        return loaded.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        raise PluginError(f"{kind} '{name}': {problem(error, loaded, given).sentence('option')}") from None
