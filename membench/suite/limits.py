"""The limits of a suite: the worst value that a metric may have in any case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from membench.errors import RuleError, SuiteError, did_you_mean
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD, metrics_by_name
from membench.records.validation import shown
from membench.suite.rules import tables_of

if TYPE_CHECKING:
    from membench.records.record import Record  # costs as much to import as all else here


def of_table(table: Mapping[str, Any], own: Sequence[Metric] = ()) -> dict[str, float]:
    """Check a suite's table ``[limits]``, and return the limits by metric field.

    Args:
        own: the suite's custom metrics.

    Raises:
        SuiteError: if one is invalid: key, value and what is valid.
    """
    return dict(_checked(key, value, own) for key, value in table.items())


def of_header(header: Mapping[str, Any], own: Sequence[Metric] = ()) -> dict[str, float]:
    """Return the limits of a suite from the header of a run.

    Raises:
        RuleError: if they are not valid.
    """
    table = tables_of(header).get("limits", {})
    if not isinstance(table, dict):
        raise RuleError("[limits] is a table")
    try:
        return of_table(table, own)
    except SuiteError as error:
        raise RuleError(str(error)) from None


def on_no_figure(limits: Iterable[str], records: Iterable[Record]) -> list[str]:
    """Return a sentence for each limit on a metric that no case has, so that it can never fail.

    A metric that some cases have says nothing of the others: a limit on the speed of decoding is not for a training.
    Cases that ended badly fail by themselves, and what they would have had is not known.

    Args:
        limits: metric fields.
    """
    measured = [record for record in records if record.status in ("ok", "diverged")]
    return [
        f"the limit on {METRIC_OF_FIELD[field].name} was not checked: no case here has this figure"
        for field in limits
        if measured and not any(field in record.metrics for record in measured)
    ]


def _checked(key: str, value: Any, own: Sequence[Metric]) -> tuple[str, float]:
    known = metrics_by_name(own)
    metric = known.get(key)
    if metric is None:
        raise SuiteError(f"limits.{key}: no such metric; {did_you_mean(key, known)}")
    try:
        limit = metric.unit.amount(value)
    except (ValueError, OverflowError):
        raise SuiteError(f"limits.{key} = {shown(value)}: write {metric.unit.expected}") from None
    if limit < 0 and metric.signed != "yes":
        raise SuiteError(f"limits.{key} = {shown(value)}: a limit must not be negative")
    return metric.field, limit
