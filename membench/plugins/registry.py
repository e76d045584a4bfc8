"""Finding plug-ins, installed ones through entry points and those in a suite's files, and creating them with their
options checked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from membench.errors import PluginError, did_you_mean, summary
from membench.plugins import Model, Options, QualityMetric, Technique, Workload, checking, local_files
from membench.plugins.distributions import distribution, normalised, same_spelling
from membench.protocol.case import REFERENCE, PluginFile
from membench.records.validation import problem, shown

KINDS = ("model", "technique", "workload", "metric")
CONTRACT: Mapping[str, type[Options]] = {
    "model": Model,
    "technique": Technique,
    "workload": Workload,
    "metric": QualityMetric,
}

_OWN = "membench"
_importing_torch: set[str] = set()
"""Modules that were seen to import torch: the second time that it is loaded, a module imports nothing."""


@dataclass(frozen=True)
class Family:
    """A plug-in as it is registered, whether or not it can be loaded.

    Attributes:
        loaded: its class, or ``None`` if it is broken or one of two of its name; ``error`` then says in what way.
    """

    name: str
    loaded: type[Options] | None
    error: str | None
    is_ambiguous: bool = False


class Found(NamedTuple):
    """What a name stands for: a class, the options that a preset sets, and its file if it is not installed."""

    loaded: type[Options]
    preset: dict[str, Any]
    file: PluginFile | None


@dataclass(frozen=True)
class _Registered:
    """A plug-in before it is loaded: an entry point, or a class of a suite's file."""

    name: str
    source: EntryPoint | type[Options]
    file: PluginFile | None = None

    @property
    def package(self) -> str:
        """What stands before the colon where somebody else has the same name."""
        if self.file is not None:
            return same_spelling(Path(self.file.name).stem)
        assert isinstance(self.source, EntryPoint)
        return normalised(self.source)

    @property
    def origin(self) -> str:
        if self.file is not None:
            return self.file.name
        assert isinstance(self.source, EntryPoint)
        return distribution(self.source)

    @property
    def whose(self) -> str:
        """The same with what of it is meant."""
        of = self.source.value if isinstance(self.source, EntryPoint) else f"class {self.source.__name__}"
        return f"{self.origin} ({of})"


_ByName = dict[str, list[_Registered]]


def _registered(kind: str, files: Sequence[PluginFile]) -> _ByName:
    """What there is of a kind, by name. No installed plug-in is imported.

    Raises:
        PluginError: if one of the files cannot be run.
    """
    installed = _installed(kind, _state_of_path())
    if not files:
        return installed
    found: _ByName = {}
    for file in files:
        for name, loaded in local_files.classes(file):
            if issubclass(loaded, CONTRACT[kind]):
                found.setdefault(name, []).append(_Registered(name, loaded, file))
    for name, same in installed.items():
        found[name] = [*found.get(name, ()), *same]
    return found


@functools.lru_cache(maxsize=16)
def _installed(kind: str, state: tuple[tuple[str, int | None], ...]) -> _ByName:
    """What is installed of a kind. It reads files of all distributions, which each name of a suite must not cost.

    Args:
        state: of the folders that distributions are found in.
    """
    del state
    found: _ByName = {}
    for entry in entry_points(group=f"membench.{kind}s"):
        same = found.setdefault(entry.name, [])
        if entry.value not in [other.source.value for other in same if isinstance(other.source, EntryPoint)]:
            same.append(_Registered(entry.name, entry))
    return found


def _state_of_path() -> tuple[tuple[str, int | None], ...]:
    """What tells that distributions may have come or gone: the folders of modules, and when each was changed."""
    return tuple((folder, _changed_at_ns(folder or ".")) for folder in sys.path)


def _changed_at_ns(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _two(kind: str, name: str, same: Sequence[_Registered]) -> PluginError:
    whose = " and ".join(one.whose for one in same)
    choices = list(dict.fromkeys(f"'{one.package}:{name}'" for one in same))
    remedy = f"write {' or '.join(choices)}" if len(choices) == len(same) else "rename one of them"
    return PluginError(f"{len(same)} plug-ins are named {kind} '{name}': of {whose}; {remedy}")


def _is_reference(kind: str, name: str) -> bool:
    """Whether a name is what every ratio is against, which is nobody else's to replace."""
    return kind == "technique" and name == REFERENCE


def _load(kind: str, name: str, same: Sequence[_Registered]) -> type[Options]:
    """Import the plug-in of a name and check it against its contract.

    Raises:
        PluginError: if it cannot be imported, does not keep the contract, or there are two of the name.
    """
    if _is_reference(kind, name):
        same = [one for one in same if one.package == _OWN]
    if len(same) != 1:
        raise _two(kind, name, same)
    (one,) = same

    def broken(how: str) -> PluginError:
        return PluginError(f"{kind} '{one.name}' of {one.whose} {how}")

    loaded: Any = one.source
    if isinstance(one.source, EntryPoint):
        had_torch = "torch" in sys.modules
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a machine may read what we print
                loaded = one.source.load()
        except (Exception, SystemExit) as error:
            raise broken(f"cannot be loaded: {local_files.said(error)}") from error
        finally:
            if "torch" in sys.modules and not had_torch:
                _importing_torch.add(one.source.module)
        if one.source.module in _importing_torch:
            raise broken("imports torch when it is loaded; it must do so in its methods")
    if not (isinstance(loaded, type) and issubclass(loaded, CONTRACT[kind])):
        raise broken(f"is no subclass of membench.plugins.{CONTRACT[kind].__name__}")
    wrong = checking.complaint(loaded, CONTRACT[kind])
    if wrong:
        line = local_files.line_of(loaded) if one.file else None
        raise broken(f"{f'in line {line} ' if line else ''}does not keep the contract: {wrong}")
    return loaded


def families(kind: str, files: Sequence[PluginFile] = ()) -> Iterator[Family]:
    """Every plug-in of a kind, broken ones too, by name.

    Raises:
        PluginError: if one of the files cannot be run.
    """
    for name, same in sorted(_registered(kind, files).items()):
        for one in same if _is_reference(kind, name) else ():
            if one.package != _OWN:
                error = f"{kind} '{name}' of {one.whose} is never used: every ratio is against membench's own"
                yield Family(name, None, error)
        try:
            yield Family(name, _load(kind, name, same), None)
        except PluginError as error:
            yield Family(name, None, str(error), is_ambiguous=len(same) > 1)


def names(kind: str, files: Sequence[PluginFile] = ()) -> list[str]:
    """Every name of a kind, presets too."""
    found = []
    for family in families(kind, files):
        presets = family.loaded.presets if family.loaded else ()
        found += [family.name, *(f"{family.name}-{preset}" for preset in presets)]
    return found


def is_taken(kind: str, name: str, files: Sequence[PluginFile] = ()) -> bool:
    """Whether a plug-in or a preset of it has this name, broken ones too."""
    package, own = _divided(name)
    registered = _of_package(_registered(kind, files), package)
    try:
        return own in registered or bool(_candidates(kind, own, registered))
    except PluginError:
        return False


def find(kind: str, name: str, files: Sequence[PluginFile] = (), also: Iterable[str] = ()) -> Found:
    """What a name stands for; 'package:name' where several packages have the same.

    Args:
        files: those of the suite, whose plug-ins count as the installed ones do.
        also: names to think of when saying what may have been meant.

    Raises:
        PluginError: for an unknown name, with the nearest known one; for a broken plug-in; for two of one name.
    """
    package, own = _divided(name)
    everything = _registered(kind, files)
    registered = _of_package(everything, package)
    found = _candidates(kind, own, registered)
    if not found and package is None:
        raise PluginError(f"no {kind} is named '{name}'; {did_you_mean(name, [*names(kind, files), *also])}")
    if not found and not registered:
        packages = {one.package for same in everything.values() for one in same}
        raise PluginError(f"no package '{package}' has a {kind}; {did_you_mean(str(package), packages)}")
    if not found:
        raise PluginError(f"package '{package}' has no {kind} '{own}'; {did_you_mean(own, registered)}")
    if len(found) > 1:
        raise _two(kind, own, [one for family, _, _ in found for one in registered[family]])
    family, loaded, preset = found[0]
    return Found(loaded, preset, registered[family][0].file)


def _divided(name: str) -> tuple[str | None, str]:
    """The package that a name asks for, if it does, and the rest."""
    package, colon, own = name.rpartition(":")
    return (same_spelling(package) if colon else None), own


def _of_package(registered: _ByName, package: str | None) -> _ByName:
    if package is None:
        return registered
    own = {name: [one for one in same if one.package == package] for name, same in registered.items()}
    return {name: same for name, same in own.items() if same}


def _candidates(kind: str, name: str, registered: _ByName) -> list[tuple[str, type[Options], dict[str, Any]]]:
    """Family, class and preset's options of whatever has a name.

    Raises:
        PluginError: if nothing has it, and one that is broken may.
    """
    found: list[tuple[str, type[Options], dict[str, Any]]] = []
    broken: PluginError | None = None
    if name in registered:
        found.append((name, _load(kind, name, registered[name]), {}))
    for family, same in registered.items():
        if not name.startswith(f"{family}-"):
            continue
        try:
            loaded = _load(kind, family, same)
        except PluginError as error:
            broken = broken or error
            continue
        preset = loaded.presets.get(name.removeprefix(f"{family}-"))
        if preset is not None:
            found.append((family, loaded, dict(preset)))
    if broken and not found:
        raise broken
    return found


def create(kind: str, name: str, options: Mapping[str, Any], files: Sequence[PluginFile] = ()) -> Any:
    """A plug-in with its options checked: what TOML and JSON write as a whole number, text or a list must be one.

    Raises:
        PluginError: for an unknown name or option or a value that does not fit, in one line.
    """
    return made(kind, name, find(kind, name, files), options)


def made(kind: str, name: str, found: Found, options: Mapping[str, Any]) -> Any:
    """The same of what ``find`` has found.

    Raises:
        PluginError: as ``create``.
    """
    for option, value in found.preset.items():
        if options.get(option, value) != value:
            raise PluginError(
                f"{kind} '{name}' sets {option} = {shown(value)}: option '{option}' = {shown(options[option])}"
                " contradicts its name"
            )
    given = {**found.preset, **options}
    for option, value in given.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise PluginError(f"{kind} '{name}': option '{option}' = {shown(value)}: no option takes that") from None
    try:
        # As JSON, whose strict reading takes lists for tuples and text for paths, but no text for numbers.
        return found.loaded.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        raise PluginError(f"{kind} '{name}': {problem(error, found.loaded, given).sentence('option')}") from None
    except Exception as error:  # of a validator of its own
        raise PluginError(f"{kind} '{name}' cannot be made: {summary(error)}") from None
