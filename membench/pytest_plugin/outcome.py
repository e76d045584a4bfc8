"""Test outcomes from records: failures, warnings and reported figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from membench.errors import one_line
from membench.host import console
from membench.pytest_plugin import entries
from membench.records.comparison import Comparison
from membench.records.record import Record
from membench.suite.gates import Gate, outcomes


class MembenchWarning(pytest.PytestWarning):
    """A remark on a case that is not a failure, such as an ineffective technique or an unchecked limit."""


def figures(records: Sequence[Record]) -> Mapping[str, float]:
    """Return the known figures of a case by metric field, as medians over its repeats."""
    found, first = Comparison(records), records[0]
    values = {metric.field: found.value(first.group, first.technique, metric.field) for metric in found.metrics}
    return {field: value for field, value in values.items() if value is not None}


def add_figures(item: pytest.Item, records: Sequence[Record], prefix: str = "") -> None:
    """Add figures to the properties of a test, which appear in JUnit XML."""
    for field, value in figures(records).items():
        item.user_properties.append((f"{prefix}{field}", value))


def settle(item: pytest.Item, records: Sequence[Record], more_failures: Sequence[str]) -> None:
    """Set the outcome of a case's test from its records: return, skip, or fail with messages."""
    messages = [*(text for record in records for text in failures(record)), *more_failures]
    for record in records:
        for remark in record.remarks:
            item.warn(MembenchWarning(one_line(f"{record.id}: {remark}")))
    if messages:
        add_output(item, records)
        lines = map(one_line, dict.fromkeys(messages))
        raise pytest.fail.Exception(console.without_commands("\n".join(lines)), pytrace=False)
    skipped = next((record for record in records if record.status == "skipped"), None)
    if skipped is not None:
        raise pytest.skip.Exception(one_line(str(skipped.message)))


def broken_gates(
    item: pytest.Item, gates: Sequence[Gate], records: Sequence[Record], reference: Sequence[Record]
) -> list[str]:
    """Return a line for each gate that a case breaks; gates that cannot be checked become warnings.

    Those of a skipped case, or of a figure that is not known, are passed on with the test's report.
    """
    if any(record.status not in ("ok", "skipped") for record in records):
        return []
    of_case = records if records is reference else [*reference, *records]
    lines = []
    for found in outcomes(gates, of_case):
        if found.case_id != records[0].id:
            continue
        if found.is_unchecked:
            entries.add_unchecked(item, found.sentence())
        elif found.holds is None:
            item.warn(MembenchWarning(one_line(found.sentence())))
        elif not found.holds:
            lines.append(found.sentence())
    return lines


def failures(record: Record) -> list[str]:
    """Return the reasons why a record fails its test, one line each."""
    if record.status == "skipped":
        return []
    lines = []
    if record.status != "ok":
        where = f" in phase {record.ended_in}" if record.ended_in else ""
        lines.append(f"{record.id} ended as {record.status}{where}: {record.message}")
    return [*lines, *(f"{record.id}: {broken}" for broken in record.broken_limits)]


def add_output(item: pytest.Item, records: Sequence[Record]) -> None:
    """Add the tail of the measured processes' output to the report of a test."""
    for record in records:
        if record.output_tail:
            item.add_report_section("call", f"output of {one_line(record.id)}", console.harmless(record.output_tail))
