"""Which package an entry point is of, and how it is named where two have the same."""

from __future__ import annotations

import functools
import re
from importlib.metadata import Distribution, EntryPoint


def same_spelling(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def normalised(entry: EntryPoint) -> str:
    """The name of an entry point's distribution, so compared; empty if it has none."""
    return same_spelling(_name_and_version(entry.dist)[0]) if entry.dist else ""


def of_package(entry: EntryPoint, package: str) -> bool:
    """Whether an entry point is of a package, however its name is spelt."""
    return normalised(entry) == same_spelling(package)


def distribution(entry: EntryPoint) -> str:
    """Name and version of an entry point's distribution."""
    return " ".join(_name_and_version(entry.dist)) if entry.dist else "an unknown distribution"


@functools.cache
def _name_and_version(dist: Distribution) -> tuple[str, str]:
    # Each time that it is asked, a distribution reads its metadata anew.
    return dist.name, dist.version
