"""Transport of measurements from a test through its report to the controller, which writes the run's file."""

from __future__ import annotations

import json
from typing import Any

import pytest

_MEASURED = pytest.StashKey[list[dict[str, Any]]]()
_ATTRIBUTE = "_membench"


def add(item: pytest.Item, header: dict[str, Any], record: dict[str, Any]) -> None:
    """Add a record and the header of its run to a test's next report; both consist of JSON types."""
    item.stash.setdefault(_MEASURED, []).append({"header": header, "record": record})


def add_comparison(item: pytest.Item, case_id: str, base: str, known: list[str] | None) -> None:
    """Add the base of a comparison to a test's next report.

    Args:
        base: the name of the baseline or run.
        known: the cases of the base if ``case_id`` is not among them, else ``None``.
    """
    item.stash.setdefault(_MEASURED, []).append({"compared": case_id, "base": base, "known": known})


def add_unchecked(item: pytest.Item, sentence: str) -> None:
    """Add a gate that was not checked to a test's next report."""
    item.stash.setdefault(_MEASURED, []).append({"unchecked": sentence})


def attach(report: pytest.TestReport, item: pytest.Item) -> None:
    """Attach a test's measurements since its last report to this report."""
    measured = item.stash.get(_MEASURED, None)
    if measured:
        # As text, because xdist cannot send attributes of all types.
        setattr(report, _ATTRIBUTE, json.dumps(measured))
        del item.stash[_MEASURED]


def detach(report: pytest.TestReport) -> list[dict[str, Any]]:
    """Remove the measurements from a report and return them; other plug-ins do not see them."""
    text = vars(report).pop(_ATTRIBUTE, None)
    found: list[dict[str, Any]] = json.loads(text) if text else []
    return found
