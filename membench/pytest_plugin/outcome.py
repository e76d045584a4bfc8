"""What records mean for the test that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from membench.records.comparison import Comparison
from membench.records.record import Record
from membench.suite.gates import Gate, outcomes


class MembenchWarning(pytest.PytestWarning):
    """Something about a case that is no failure: a technique that changed nothing, a limit that was not checked."""


def figures(records: Sequence[Record]) -> Mapping[str, float]:
    """What is known of a case, by metric field: medians over its repeats."""
    found, first = Comparison(records), records[0]
    values = {metric.field: found.value(first.group, first.technique, metric.field) for metric in found.metrics}
    return {field: value for field, value in values.items() if value is not None}


def add_figures(item: pytest.Item, records: Sequence[Record], prefix: str = "") -> None:
    """Add figures to what is told of a test, in JUnit's XML for one."""
    for field, value in figures(records).items():
        item.user_properties.append((f"{prefix}{field}", value))


def settle(item: pytest.Item, records: Sequence[Record], also_wrong: Sequence[str]) -> None:
    """End the test of a case as its records say: return, skip, or fail with what went wrong."""
    wrong = [*(text for record in records for text in complaints(record)), *also_wrong]
    for record in records:
        for remark in record.remarks:
            item.warn(MembenchWarning(f"{record.id}: {remark}"))
    if wrong:
        add_output(item, records)
        raise pytest.fail.Exception("\n".join(dict.fromkeys(wrong)), pytrace=False)
    skipped = next((record for record in records if record.status == "skipped"), None)
    if skipped is not None:
        raise pytest.skip.Exception(str(skipped.message))


def broken_gates(
    item: pytest.Item, gates: Sequence[Gate], records: Sequence[Record], reference: Sequence[Record]
) -> list[str]:
    """The gates that a case breaks, a line each; of those that nothing could be held against it is warned."""
    if any(record.status != "ok" for record in records):
        return []
    of_case = records if records is reference else [*reference, *records]
    lines = []
    for found in outcomes(gates, of_case):
        if found.case_id != records[0].id:
            continue
        if found.holds is None:
            item.warn(MembenchWarning(found.sentence()))
        elif not found.holds:
            lines.append(found.sentence())
    return lines


def complaints(record: Record) -> list[str]:
    """Why a record fails its test, a line each; none where it does not."""
    if record.status == "skipped":
        return []
    lines = []
    if record.status != "ok":
        where = f" in phase {record.ended_in}" if record.ended_in else ""
        lines.append(f"{record.id} ended as {record.status}{where}: {record.message}")
    return [*lines, *(f"{record.id}: {broken}" for broken in record.broken_limits)]


def add_output(item: pytest.Item, records: Sequence[Record]) -> None:
    """Show the end of what measured processes printed in the report of a test."""
    for record in records:
        if record.output_tail:
            item.add_report_section("call", f"output of {record.id}", record.output_tail)
