"""Lookup of suites by name: those in ./suites, and those that packages provide through entry points."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from membench.errors import SuiteError, summary
from membench.plugins.distributions import distribution, normalised, of_package

GROUP = "membench.suites"
"""The entry points of this group have the names of suites and load the paths of their files."""


@dataclass(frozen=True)
class NamedSuite:
    """A suite that can be loaded by name.

    Attributes:
        source: its file, or the entry points of that name; several if several packages provide the name.
    """

    name: str
    source: Path | Sequence[EntryPoint]

    @property
    def origin(self) -> str:
        """Return the folder or the distributions that provide it."""
        if isinstance(self.source, Path):
            return "./suites"
        return " and ".join(distribution(entry) for entry in self.source)

    def path(self) -> Path:
        """Return the suite's file.

        Raises:
            SuiteError: if several packages provide the name, or if its entry point is broken.
        """
        if isinstance(self.source, Path):
            return self.source
        if len(self.source) > 1:
            whose = " and ".join(f"{distribution(entry)} ({entry.value})" for entry in self.source)
            choices = " or ".join(f"'{normalised(entry)}:{self.name}'" for entry in self.source)
            raise SuiteError(f"{len(self.source)} suites are named '{self.name}': of {whose}; write {choices}")
        (entry,) = self.source
        whose = f"suite '{self.name}' of {distribution(entry)} ({entry.value})"
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output may be read by a program
                found = entry.load()
        except (Exception, SystemExit) as error:
            raise SuiteError(f"{whose} cannot be loaded: {summary(error)}") from error
        if not isinstance(found, str | os.PathLike):
            raise SuiteError(f"{whose} is no path of a file")
        return Path(found)


def named() -> Mapping[str, NamedSuite]:
    """Return all named suites, by name, without loading any; those in ./suites take precedence over packages'."""
    found = {path.stem: NamedSuite(path.stem, path) for path in sorted((Path.cwd() / "suites").glob("*.toml"))}
    provided: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        same = provided.setdefault(entry.name, [])
        if entry.value not in [other.value for other in same]:
            same.append(entry)
    for name, entries in sorted(provided.items()):
        found.setdefault(name, NamedSuite(name, entries))
    return found


def find(name: str) -> NamedSuite | None:
    """Return the suite with a name, written 'name' or 'package:name'; ``None`` if there is none."""
    package, colon, own = name.rpartition(":")
    if not colon:
        return named().get(name)
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == own and of_package(entry, package)]
    return NamedSuite(own, entries) if entries else None
