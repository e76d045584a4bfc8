"""Limits and gates that were not checked (a skipped case, no figure): they make pytest's exit code 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from membench.errors import EXIT_CANNOT_COMPARE, one_line
from membench.records.encoding import record_of
from membench.records.run_file import Run


class UncheckedRules:
    """What was not checked in all tests, collected in the process that receives all reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._is_allowed: bool = config.getoption("membench_allow_skipped")
        self._lines: dict[str, None] = {}
        self._headers: dict[str, Mapping[str, Any]] = {}
        self._records: dict[str, list[dict[str, Any]]] = {}

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add the entries of a report."""
        for entry in entries:
            if "unchecked" in entry:
                self._lines[entry["unchecked"]] = None
            elif "record" in entry:
                record, header = entry["record"], entry["header"]
                self._lines |= {f"{record['id']}: {limit}": None for limit in record.get("unchecked_limits", ())}
                self._headers[header["run"]] = header
                # What the observer sampled is large, and no rule is about it.
                self._records.setdefault(header["run"], []).append({**record, "processes": [], "timeline": {}})

    def add_rules_of_no_case(self) -> None:
        """Add the limits and gates of suites that fit none of their cases, once all tests have run."""
        from membench.report.broken_rules import idle_gates, idle_limits

        for name, header in self._headers.items():
            run = Run(Path(), dict(header), tuple(record_of(record) for record in self._records[name]))
            self._lines |= dict.fromkeys((*idle_gates(run), *idle_limits(run)))

    def finish(self) -> int:
        """Return the exit code if nothing else went wrong."""
        return EXIT_CANNOT_COMPARE if self._lines and not self._is_allowed else 0

    def summarize(self, terminal: Any) -> None:
        """Print what was not checked."""
        for line in self._lines:
            terminal.write_line(one_line(f"membench: {line}"))
        if self.finish():
            terminal.write_line("membench: exit code 3 for what was not checked, unless --membench-allow-skipped")
