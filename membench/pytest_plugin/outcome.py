"""What records mean for the test that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from membench.compare import Comparison
from membench.record import METRICS, Record


def figures(records: Sequence[Record]) -> Mapping[str, float]:
    """What is known of a case, by metric field: medians over its repeats."""
    found, first = Comparison(records), records[0]
    values = {metric.field: found.value(first.group, first.technique, metric.field) for metric in METRICS}
    return {field: value for field, value in values.items() if value is not None}


def add_figures(item: pytest.Item, records: Sequence[Record], prefix: str = "") -> None:
    """Add figures to what is told of a test, in JUnit's XML for one."""
    for field, value in figures(records).items():
        item.user_properties.append((f"{prefix}{field}", value))


def settle(item: pytest.Item, records: Sequence[Record]) -> None:
    """End the test of a case as its records say: return, skip, or fail with what went wrong."""
    wrong = [text for record in records for text in complaints(record)]
    if wrong:
        add_output(item, records)
        raise pytest.fail.Exception("\n".join(dict.fromkeys(wrong)), pytrace=False)
    skipped = next((record for record in records if record.status == "skipped"), None)
    if skipped is not None:
        raise pytest.skip.Exception(str(skipped.message))


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
