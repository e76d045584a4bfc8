"""Limits and gates that were not checked (a skipped case, an unknown figure): they make pytest's exit code 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from membench.errors import EXIT_CANNOT_COMPARE, one_line


class UncheckedRules:
    """What was not checked in all tests, collected in the process that receives all reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._is_allowed: bool = config.getoption("membench_allow_skipped")
        self._lines: dict[str, None] = {}

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add the entries of a report."""
        for entry in entries:
            if "unchecked" in entry:
                self._lines[entry["unchecked"]] = None
            elif "record" in entry:
                record = entry["record"]
                self._lines |= {f"{record['id']}: {limit}": None for limit in record.get("unchecked_limits", ())}

    def finish(self) -> int:
        """Return the exit code if nothing else went wrong."""
        return EXIT_CANNOT_COMPARE if self._lines and not self._is_allowed else 0

    def summarize(self, terminal: Any) -> None:
        """Print what was not checked."""
        for line in self._lines:
            terminal.write_line(one_line(f"membench: {line}"))
        if self.finish():
            terminal.write_line("membench: exit code 3 for what was not checked, unless --membench-allow-skipped")
