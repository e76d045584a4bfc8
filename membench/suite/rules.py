"""The rules of a suite: its tolerances and gates, checked against its metrics and cases."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from membench.errors import RuleError, SuiteError, did_you_mean
from membench.records.metric import Metric
from membench.records.metrics import METRICS_OF_SCRIPTS
from membench.records.validation import shown
from membench.suite.gates import Gate
from membench.suite.gates import of_table as gates_of_table
from membench.suite.tolerances import Tolerance
from membench.suite.tolerances import of_table as tolerances_of_table

_FOOTPRINT_OF_PROGRAMS = "5%"
"""The default tolerance for the footprint of a user's program."""


def rules_of(header: Mapping[str, Any], own: Sequence[Metric] = ()) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    """Return the tolerances and gates of a suite from the header of a run.

    Args:
        own: the suite's custom metrics.

    Raises:
        RuleError: if they are not valid.
    """
    tables = tables_of(header)
    regression, gate = tables.get("regression", {}), tables.get("gate", {})
    if not isinstance(regression, dict) or not isinstance(gate, dict):
        raise RuleError("[regression] and [gate] are tables")
    return rules(regression, gate, own, of_program="script" in tables)


def tables_of(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tables of a suite from the header of a run.

    Raises:
        RuleError: if its text is not TOML.
    """
    tables: Mapping[str, Any] | None = header.get("suite_tables")
    if tables is not None:
        return tables
    try:
        return tomllib.loads(str(header.get("suite_text", "")))
    except (ValueError, RecursionError):
        raise RuleError("the suite's text in the run is not TOML") from None


def rules(
    regression: Mapping[str, Any], gate: Mapping[str, Any], own: Sequence[Metric], *, of_program: bool
) -> tuple[tuple[Tolerance, ...], tuple[Gate, ...]]:
    """Return the tolerances and gates of the tables ``[regression]`` and ``[gate]``.

    Args:
        own: the suite's custom metrics.
        of_program: whether the suite measures a user's program.

    Raises:
        RuleError: if they are not valid.
    """
    if of_program:  # the only default-watched metric that a program has is the time
        regression = {"peak_footprint": _FOOTPRINT_OF_PROGRAMS, **regression}
    return tolerances_of_table(regression, own), gates_of_table(gate, own)


def refuse_unsupported_by_programs(
    limits: Mapping[str, Any], tolerances: Sequence[Tolerance], gates: Sequence[Gate]
) -> None:
    """Refuse limits and rules about metrics that are not measured for programs, since they could never fail.

    Raises:
        SuiteError: if there is one.
    """
    named = [(f"limits.{name}", name) for name in limits]
    named += [(f"regression.{each.metric.name}", each.metric.name) for each in tolerances if each.origin == "suite"]
    named += [(f"gate: rule {shown(gate.text)}", name) for gate in gates for name in sorted(gate.metrics)]
    known = [metric.name for metric in METRICS_OF_SCRIPTS]
    for where, name in named:
        if name not in known:
            raise SuiteError(f"{where}: of a script {name} is not known; known: {', '.join(known)}")
    for gate in gates:
        if gate.uses_reference:
            raise SuiteError(f"gate: rule {shown(gate.text)}: a script has no reference; hold it against an amount")


def refuse_unmatched_patterns(tolerances: Sequence[Tolerance], gates: Sequence[Gate], case_ids: Sequence[str]) -> None:
    """Refuse patterns that match no case, since their rules would never be checked.

    Raises:
        SuiteError: if there is one.
    """
    for table, pattern in (*(("regression", each.match) for each in tolerances), *(("gate", g.match) for g in gates)):
        if not any(fnmatch.fnmatchcase(case_id, pattern) for case_id in case_ids):
            hint = did_you_mean(pattern, case_ids)
            raise SuiteError(f"{table}.case: match = {shown(pattern)} fits no case of the suite; {hint}")
