"""Checks of ``--membench-compare`` over a pytest run: an empty comparison or an unused tolerance must not pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from membench.errors import RuleError, UnknownMetric, one_line
from membench.pytest_plugin.judging import command_line_tolerances, refuse_unknown
from membench.records.metrics import METRIC_OF_FIELD
from membench.suite.tolerances import Tolerances

_MOST_NAMED = 10


class Comparison:
    """The comparisons of all tests, collected in the process that receives all reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._own_fields: dict[str, None] = {}
        """Fields of metrics that are plug-ins."""
        self._measured: dict[str, None] = {}
        self._bases_with_cases: set[str] = set()
        self._new: dict[str, dict[str, None]] = {}
        """Cases that a base does not contain, by base."""
        self._known: dict[str, Sequence[str]] = {}
        self._messages: list[str] = []

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add the entries of a report."""
        for entry in entries:
            if "record" in entry:
                self._measured[entry["record"]["id"]] = None
                self._own_fields |= dict.fromkeys(entry["header"].get("own_metrics", ()))
            elif "unchecked" in entry:
                continue
            elif entry["known"] is None:
                self._bases_with_cases.add(entry["base"])
            else:
                self._new.setdefault(entry["base"], {})[entry["compared"]] = None
                self._known[entry["base"]] = entry["known"]

    def finish(self) -> bool:
        """Find cases and tolerances without effect; return whether they make the options wrong."""
        if not self._measured:
            self._messages.append("nothing was compared: no test measured anything")
            return bool(self._config.getoption("membench_fail"))
        if not self._bases_with_cases and not self._new:
            self._messages.append("nothing was compared: no case ended well")
        for base, cases in self._new.items():
            if base in self._bases_with_cases:
                self._messages.append(f"not in {base}, so held against nothing: {_listed(cases)}")
            else:
                self._messages.append(
                    f"nothing was compared: {base} has none of what was measured ({_listed(cases)});"
                    f" it has {_listed(self._known[base])}"
                )
        is_wrong = not self._new.keys() <= self._bases_with_cases
        own = [METRIC_OF_FIELD[field] for field in self._own_fields]
        try:
            refuse_unknown(self._config, own)
            Tolerances(command_line=command_line_tolerances(self._config, own)).refuse_unmatched(self._measured)
        except UnknownMetric as error:
            self._messages.append(str(error))
            is_wrong = True
        except RuleError as error:
            self._messages.append(f"--membench-fail: {error}")
            is_wrong = True
        return is_wrong

    def summarize(self, terminal: Any) -> None:
        """Print the findings of ``finish``."""
        for line in self._messages:
            terminal.write_line(one_line(f"membench: {line}"))


def _listed(cases: Sequence[str] | Mapping[str, None]) -> str:
    names = list(cases)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
