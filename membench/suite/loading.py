"""Finding and reading suites: by name or path, in TOML or in Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from membench.errors import SuiteError, did_you_mean, nearest, one_line
from membench.records.names import checked_device
from membench.records.validation import shown
from membench.suite import lookup, python_files, toml_files
from membench.suite.checking import checked
from membench.suite.suite import FILE_BEING_READ, Suite


def load_suite(name: str | Path, devices: list[str] | None = None) -> Suite:
    """Read and check a suite.

    Args:
        name: the name of a suite that comes with membench or lies in ./suites, or a path. If a Python file makes
            several suites, the path ends with the name of one: ``suites.py::small``.
        devices: devices in place of the suite's own.

    Raises:
        SuiteError: in one line: file, key, value and what is valid.
    """
    for device in devices or ():
        try:
            checked_device(device)
        except ValueError as error:
            raise SuiteError(f"--device {shown(device)}: {error}") from None
    file, _, chosen = str(name).partition("::")
    path = _suite_file(file if chosen else name)
    if path.suffix == ".py":
        suite = _chosen(suites_in(path), path, chosen)
        return suite if devices is None else suite.on(devices)
    if chosen:
        raise SuiteError(f"{shown(str(name))}: only a file in Python makes several suites")
    text = toml_files.read(path)
    values = checked(toml_files.parsed(path, text), str(path), path.parent, devices)
    return Suite._from_values({**values, "path": path, "text": text, "tables": None})


def suites_in(path: Path) -> list[Suite]:
    """Run a Python file and return its suites: global variables, and items of lists, tuples and dicts among these.

    Raises:
        SuiteError: if it fails, makes no suite, or makes two of the same name: file, line and what is wrong.
    """
    token = FILE_BEING_READ.set(path)
    try:
        namespace, text = python_files.execute(path)
    finally:
        FILE_BEING_READ.reset(token)
    found: dict[str, Suite] = {}
    for suite in python_files.instances_in(namespace.values(), Suite):
        other = found.setdefault(suite.name, suite)
        if other is not suite:
            raise SuiteError(f"{path}: two suites are named '{suite.name}'")
    if not found:
        raise SuiteError(f"{path} makes no suite: assign a membench.Suite(...) to a variable")
    return [suite._with(path=path, text=text) for suite in found.values()]


def is_suite(name: str) -> bool:
    """Whether a name can only mean a suite: it is the name of one, or a path."""
    return _is_path(name) or lookup.find(name) is not None


def description(path: Path) -> str:
    """Return the first line of a suite's description. A TOML file is only parsed; a Python file is run.

    Raises:
        SuiteError: if it cannot be read.
    """
    file, _, chosen = str(path).partition("::")
    if file.endswith(".py"):
        own = None if chosen else python_files.docstring(Path(file))
        return one_line((own or load_suite(path).description).strip().partition("\n")[0])
    head = toml_files.parsed(path, toml_files.read(path)).get("suite")
    written = head.get("description", "") if isinstance(head, dict) else ""
    return one_line(str(written).strip().partition("\n")[0])


def _chosen(suites: Sequence[Suite], path: Path, name: str) -> Suite:
    if not name:
        if len(suites) > 1:
            several = ", ".join(f"{path}::{suite.name}" for suite in suites)
            raise SuiteError(f"{path} makes {len(suites)} suites; name one: {several}")
        return suites[0]
    named = next((suite for suite in suites if suite.name == name), None)
    if named is None:
        raise SuiteError(f"{path} makes no suite {shown(name)}; {did_you_mean(name, (s.name for s in suites))}")
    return named


def _suite_file(name: str | Path) -> Path:
    """Return the file of a suite that is given by name or path.

    Raises:
        SuiteError: if there is none.
    """
    path, known = Path(name), lookup.named()
    is_path = _is_path(str(name))
    if not is_path and (found := lookup.find(str(name))) is not None:
        return found.path()
    try:
        if path.is_file():
            return path
        is_folder, exists = path.is_dir(), path.exists()
        neighbours = {other.stem for other in path.parent.glob("*.toml")} if path.parent.is_dir() else set()
    except OSError as error:  # the name is too long, or the user may not read the folder
        raise SuiteError(f"{shown(str(path))}: {error.strerror}") from None
    if not is_path:
        hint = f"did you mean '{path}.toml'?" if path.name in neighbours else did_you_mean(str(name), known)
        raise SuiteError(f"no suite is named {shown(str(name))}; {hint}")
    if is_folder:
        raise SuiteError(f"{path} is a folder; name the .toml file of a suite")
    if exists:
        raise SuiteError(f"{path} is no file that a suite can be read from")
    near = nearest(path.stem, neighbours - {path.stem})
    if os.sep not in str(name) and path.stem in known:
        hint = f"; for the suite of that name write '{path.stem}'"
    else:
        hint = f"; did you mean '{path.with_name(f'{near}.toml')}'?" if near else ""
    raise SuiteError(f"{shown(str(path))}: there is no such file{hint}")


def _is_path(name: str) -> bool:
    return os.sep in name or name.partition("::")[0].endswith((".toml", ".py"))
