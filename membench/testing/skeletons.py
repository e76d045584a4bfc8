"""New packages with a plug-in in them: files from templates, which work as they are."""

from __future__ import annotations

import keyword
import re
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from membench.errors import MembenchError, one_line
from membench.plugins import registry
from membench.records.names import checked_name
from membench.suite import lookup

_FILES: Mapping[str, str] = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "src/{module}/__init__.py": "module.py",
    "src/{module}/layers.py": "layers.py",
    "tests/test_{module}.py": "test.py",
    "{name}.toml": "suite.toml",
}
"""Templates by where what they give goes; a kind that has no such template has no such file."""
_SUITE_IN_PACKAGE = "src/{module}/{name}.toml"


def write(kind: str, name: str, into: Path) -> tuple[Path, list[Path]]:
    """Write a package with a plug-in to a new folder of ``into``: ``membench-NAME``.

    Returns:
        the folder, and its files relative to it.

    Raises:
        MembenchError: for a name that cannot be one or is taken, for a folder that is there already or cannot be
            written to; nothing is left behind.
    """
    _refuse_name(kind, name)
    package = f"membench-{name}"
    values = {
        "kind": kind,
        "name": name,
        "package": package,
        "module": package.replace("-", "_"),
        "class_name": "".join(part[:1].upper() + part[1:] for part in name.split("-")),
    }
    folder = into / package
    rendered = {
        Path(path.format_map(values)): Template(text).substitute(values) for path, text in _templates(kind).items()
    }
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise MembenchError(f"{folder} is there already; nothing was written") from None
    except OSError as error:
        raise MembenchError(f"{folder} cannot be made: {error.strerror}") from None
    try:
        for path, text in rendered.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise MembenchError(f"{folder} cannot be written: {error.strerror}") from None
    return folder, list(rendered)


def _refuse_name(kind: str, name: str) -> None:
    wanted = "lower-case letters and digits, in words joined by '-', the first beginning with a letter"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise MembenchError(f"'{one_line(name)}' cannot name a {kind}: {wanted}")
    try:
        checked_name(name)
    except ValueError as error:
        raise MembenchError(f"'{name}' cannot name a {kind}: {error}") from None
    if keyword.iskeyword(name.capitalize()):
        raise MembenchError(f"'{name}' cannot name a {kind}: its class would be called {name.capitalize()}")
    if lookup.find(name) if kind == "suite" else registry.is_taken(kind, name):
        raise MembenchError(f"there is a {kind} named '{name}' already; choose another name")


def _templates(kind: str) -> dict[str, str]:
    """Texts by the path that each is for."""
    found = {}
    folders = [files("membench.testing") / "templates" / which for which in (kind, "any")]
    for path, template in _FILES.items():
        sources = [folder / f"{template}.txt" for folder in folders if (folder / f"{template}.txt").is_file()]
        if sources:
            place = _SUITE_IN_PACKAGE if (kind, template) == ("suite", "suite.toml") else path
            found[place] = sources[0].read_text(encoding="utf-8")
    return found
