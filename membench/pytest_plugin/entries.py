"""What a test measured, on its way into a run's file: from the test to its report, and with that to the controller."""

from __future__ import annotations

import json
from typing import Any

import pytest

_MEASURED = pytest.StashKey[list[dict[str, Any]]]()
_ATTRIBUTE = "_membench"


def add(item: pytest.Item, header: dict[str, Any], record: dict[str, Any]) -> None:
    """Give a test's next report a record, and the header of the run that it belongs to; both of what JSON knows."""
    item.stash.setdefault(_MEASURED, []).append({"header": header, "record": record})


def add_comparison(item: pytest.Item, case_id: str, base: str, known: list[str] | None) -> None:
    """Give a test's next report what a case was held against.

    Args:
        base: the name of the baseline or run.
        known: the cases that it has, where this one is not among them.
    """
    item.stash.setdefault(_MEASURED, []).append({"compared": case_id, "base": base, "known": known})


def put_on(report: pytest.TestReport, item: pytest.Item) -> None:
    """Put what a test has measured since its last report on this one."""
    measured = item.stash.get(_MEASURED, None)
    if measured:
        # As text: xdist sends attributes of reports, but not every kind of value.
        setattr(report, _ATTRIBUTE, json.dumps(measured))
        del item.stash[_MEASURED]


def taken_off(report: pytest.TestReport) -> list[dict[str, Any]]:
    """What ``put_on`` has put on a report; other plug-ins need not see it."""
    text = vars(report).pop(_ATTRIBUTE, None)
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return found
