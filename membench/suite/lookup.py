"""Suites that can be named without a path: those in ./suites, and those that packages provide through entry points."""

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
"""An entry point of it has a suite's name and is the path of its file."""


@dataclass(frozen=True)
class NamedSuite:
    """A suite's name, and who has it.

    Attributes:
        source: its file, or the entry points of that name, more than one where packages have the same.
    """

    name: str
    source: Path | Sequence[EntryPoint]

    @property
    def origin(self) -> str:
        """The folder or the distributions that it comes from."""
        if isinstance(self.source, Path):
            return "./suites"
        return " and ".join(distribution(entry) for entry in self.source)

    def path(self) -> Path:
        """The suite's file.

        Raises:
            SuiteError: if two packages have the name, or the one that has it is broken.
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
            with contextlib.redirect_stdout(sys.stderr):  # a machine may read what we print
                found = entry.load()
        except (Exception, SystemExit) as error:
            raise SuiteError(f"{whose} cannot be loaded: {summary(error)}") from error
        if not isinstance(found, str | os.PathLike):
            raise SuiteError(f"{whose} is no path of a file")
        return Path(found)


def named() -> Mapping[str, NamedSuite]:
    """Every suite that can be named, by its name; one in ./suites comes before a package's. Nothing is loaded."""
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
    """The suite of a name, or of a package ('package:name'); ``None`` if there is none."""
    package, colon, own = name.rpartition(":")
    if not colon:
        return named().get(name)
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == own and of_package(entry, package)]
    return NamedSuite(own, entries) if entries else None
