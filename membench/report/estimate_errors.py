"""How far estimates are from what was measured, case by case and in all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.report.table_formats import DEFAULT, FORMATS

PEAK = "peak_live_bytes"
_SHOWN = (
    PEAK, "weights_bytes", "optimizer_state_bytes", "gradients_bytes", "activations_bytes", "cache_bytes",
    "communication_memory_bytes", "disk_bytes",
)  # fmt: skip
_WITHIN_PERCENT = (1, 5, 10, 15)


@dataclass(frozen=True)
class EstimateError:
    """A figure of a case, estimated and measured.

    Attributes:
        how: how it was estimated: ``traced`` or ``arithmetic``.
    """

    case: str
    field: str
    how: str
    estimated: float
    measured: float

    @property
    def error_percent(self) -> float:
        """How far the estimate is above what was measured."""
        return (self.estimated / self.measured - 1) * 100


def errors(estimated: Sequence[Record], measured: Sequence[Record]) -> list[EstimateError]:
    """Return the errors of all figures that both know, in the order of the estimates.

    Of a case that was measured several times it is the median. What is measured as nothing has no error.
    """
    repeats: dict[str, list[Record]] = {}
    for record in measured:
        if record.status in ("ok", "diverged"):
            repeats.setdefault(record.id, []).append(record)
    return [
        found
        for record in estimated
        if record.status == "ok" and record.id in repeats
        for found in _of_case(record, repeats[record.id])
    ]


def _of_case(estimate: Record, measured: Sequence[Record]) -> Iterator[EstimateError]:
    for field in _SHOWN:
        value = estimate.metrics.get(field)
        known = [each for record in measured if (each := record.metrics.get(field)) is not None]
        if value is None or not known or (middle := statistics.median(known)) <= 0:
            continue
        how = str(estimate.obtained[field].get("source", "")).partition(":")[0]
        yield EstimateError(estimate.id, field, how, value, middle)


def table(found: Sequence[EstimateError], form: str = DEFAULT) -> str:
    """A row a case: its live peak, estimated and measured, and the errors; in a flat format a row a figure."""
    style = FORMATS[form]
    if style.is_flat:
        return style.render([_flat(each) for each in found])
    fields = [field for field in _SHOWN if any(each.field == field for each in found)]
    return style.render([_shown(case, fields, form) for case in _by_case(found).items()])


def _by_case(found: Sequence[EstimateError]) -> Mapping[str, Mapping[str, EstimateError]]:
    cases: dict[str, dict[str, EstimateError]] = {}
    for each in found:
        cases.setdefault(each.case, {})[each.field] = each
    return cases


def _flat(each: EstimateError) -> dict[str, object]:
    return {
        "case": each.case,
        "metric": METRIC_OF_FIELD[each.field].name,
        "how": each.how,
        "estimated": each.estimated,
        "measured": each.measured,
        "error_percent": round(each.error_percent, 4),
    }


def _shown(case: tuple[str, Mapping[str, EstimateError]], fields: Sequence[str], form: str) -> dict[str, str]:
    case_id, figures = case
    style = FORMATS[form]
    peak, metric = figures.get(PEAK), METRIC_OF_FIELD[PEAK]
    row = {
        "case": style.cell(case_id),
        "how": next(iter(figures.values())).how,
        "estimated": "–" if peak is None else metric.format(peak.estimated),
        "measured": "–" if peak is None else metric.format(peak.measured),
    }
    titles = {field: "error" if field == PEAK else METRIC_OF_FIELD[field].title for field in fields}
    errors = {
        title: f"{figures[field].error_percent:+.2f}%" if field in figures else "–" for field, title in titles.items()
    }
    return row | errors


def summary(estimated: Sequence[Record], found: Sequence[EstimateError]) -> list[str]:
    """Return lines on all live peaks together, and on the cases that could not be compared."""
    peaks = [each for each in found if each.field == PEAK]
    lines = []
    if peaks:
        sizes = [abs(each.error_percent) for each in peaks]
        worst = max(peaks, key=lambda each: abs(each.error_percent))
        within = ", ".join(f"{sum(size <= most for size in sizes)} within {most}%" for most in _WITHIN_PERCENT)
        lines.append(
            f"live peak of {len(peaks)} cases: median error {statistics.median(sizes):.2f}%, {within}; worst"
            f" {worst.error_percent:+.2f}%, {worst.case}"
        )
    compared = {each.case for each in found}
    alone = [record.id for record in estimated if record.status == "ok" and record.id not in compared]
    if alone:
        lines.append(f"not measured in that run: {', '.join(alone)}")
    return lines
