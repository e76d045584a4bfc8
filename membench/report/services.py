"""A run's figures in the formats of services that keep a history of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence

from membench.records.disturbed_times import is_disturbed
from membench.records.metric import Metric
from membench.records.record import Record, metrics_in


def benchmark_action(records: Sequence[Record]) -> str:
    """JSON for github-action-benchmark's tool ``customSmallerIsBetter``: what is better if it is less.

    A case's figure is the median over its repeats, ``range`` how far they lie from it.
    """
    entries = []
    for case_id, metric, values in _figures(records):
        if metric.better == "lower":
            middle = statistics.median(values)
            entry = {"name": f"{case_id} {metric.name}", "unit": metric.unit.symbol or metric.title, "value": middle}
            if len(values) > 1:
                entry["range"] = f"± {max(abs(value - middle) for value in values):g}"
            entries.append({**entry, "extra": f"{metric.meaning}; repeats: {len(values)}"})
    return json.dumps(entries, indent=2)


def bencher(records: Sequence[Record]) -> str:
    """Bencher Metric Format: a benchmark a case, a measure a metric, its unit at the end of its name.

    The bounds are the least and the greatest of the repeats.
    """
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for case_id, metric, values in _figures(records):
        measure = {"value": statistics.median(values)}
        if len(values) > 1:
            measure |= {"lower_value": min(values), "upper_value": max(values)}
        cases.setdefault(case_id, {})[metric.field.replace("_", "-")] = measure
    return json.dumps(cases, indent=2)


def _figures(records: Sequence[Record]) -> Iterator[tuple[str, Metric, list[float]]]:
    """What is known of every case that ended well, in the order in which the cases were measured.

    Times that other processes disturbed are left out: a history of them would raise alarms without a cause.
    """
    for case_id in dict.fromkeys(record.id for record in records):
        repeats = [record for record in records if record.id == case_id and record.status == "ok"]
        for metric in metrics_in(repeats):
            kept = [record for record in repeats if not is_disturbed(record, metric.field)]
            values = [value for record in kept if (value := record.metrics.get(metric.field)) is not None]
            if values:
                yield case_id, metric, values
