"""Checking the tables of a suite, and turning them into cases, settings, limits and rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from membench.errors import PluginError, RuleError, SuiteError
from membench.plugins import local_files
from membench.protocol.case import PluginFile
from membench.records.metrics import own_metrics
from membench.records.validation import problem
from membench.suite.expansion import cases_of_program, expand
from membench.suite.limits import of_table as limits_of_table
from membench.suite.rules import refuse_unmatched_patterns, refuse_unsupported_by_programs, rules
from membench.suite.schema import Contents, ProgramContents, Settings


def checked(tables: Mapping[str, Any], where: str, folder: Path, devices: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of a ``Suite``'s attributes, by name, from its tables.

    Args:
        where: the suite's file or name, at the start of error messages.
        folder: the folder that a program's file is relative to.
        devices: devices in place of the suite's own.

    Raises:
        SuiteError: in one line: key, value and what is valid.
    """
    if {"script", "matrix"} <= tables.keys():
        raise SuiteError(f"{where}: 'script' and 'matrix' do not go together: a suite is of cases, or of a program")
    schema: type[Contents | ProgramContents] = ProgramContents if "script" in tables else Contents
    try:
        contents = schema.model_validate(tables)
    except ValidationError as error:
        raise SuiteError(f"{where}: {problem(error, schema, tables).sentence()}") from None
    try:
        files: tuple[PluginFile, ...] = ()
        if isinstance(contents, Contents):
            files = _plugin_files(contents.suite.plugins, folder)
            cases, settings = expand(contents, devices, files), contents.settings
        else:
            cases = cases_of_program(contents.script, folder, devices)
            settings = Settings.model_validate(contents.settings.model_dump())
        own = own_metrics(cases[0].metric_plugins)
        limits = limits_of_table(contents.limits, own)
        tolerances, gates = rules(contents.regression, contents.gate, own, of_program=schema is ProgramContents)
        if isinstance(contents, ProgramContents):
            refuse_unsupported_by_programs(contents.limits, tolerances, gates)
        if devices is None:  # a pattern may match the devices that were replaced
            refuse_unmatched_patterns(tolerances, gates, [case.id for case in cases])
    except (SuiteError, RuleError) as error:
        raise SuiteError(f"{where}: {error}") from None
    return {
        "name": contents.suite.name,
        "description": contents.suite.description,
        "cases": cases,
        "settings": settings,
        "limits": limits,
        "tolerances": tolerances,
        "gates": gates,
        "plugin_files": files,
    }


def _plugin_files(names: Sequence[str], folder: Path) -> tuple[PluginFile, ...]:
    """Return the suite's own plug-in files, after running each once to check that it loads.

    Raises:
        SuiteError: if a file is missing or broken, or has no plug-in although the suite names it.
    """
    try:
        files = local_files.named(names, folder)
    except PluginError as error:
        raise SuiteError(f"suite.plugins: {error}") from None
    for file in files:
        try:
            found = list(local_files.classes(file))
        except PluginError as error:
            raise SuiteError(f"plug-in file {error}") from None
        if not found and file.name in names:
            raise SuiteError(
                f"suite.plugins: '{file.name}' has no plug-in: one is a class that is defined there, derived from one"
                " of membench.plugins, and has a name that begins with no underscore"
            )
    return files
