"""Amounts of a metric as people write them: '2 GiB', '200 ms', 0.5."""

from __future__ import annotations

import math
from typing import Any

from membench import units
from membench.records.metrics import Metric


def amount(metric: Metric, value: Any) -> float:
    """An amount in the unit of its metric's field; sizes must say their unit, durations may.

    Raises:
        ValueError: if it is none.
        OverflowError: if it is more than a number holds.
    """
    if isinstance(value, str) and metric.field.endswith("_bytes"):
        return units.parse_bytes(value)
    if isinstance(value, str) and is_duration(metric):
        return units.parse_seconds(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or metric.field.endswith("_bytes") or not math.isfinite(value):
        raise ValueError
    return float(value)


def is_duration(metric: Metric) -> bool:
    """Whether a metric counts seconds, and not something a second."""
    return metric.field.endswith("_s") and not metric.field.endswith("_per_s")


def wanted(metric: Metric) -> str:
    """What an amount of this metric looks like, in words."""
    if metric.field.endswith("_bytes"):
        return "a size in B, KiB, MiB, GiB or TiB, such as '2 GiB'"
    if is_duration(metric):
        return "a duration in µs, ms, s, min or h, such as '200 ms'; a bare number is seconds"
    units_by_end = {
        "tokens_per_s": "tokens a second",
        "_percent": "percent",
        "_nats": "nats a token",
        "_j": "joules",
        "bits_per_byte": "bits per byte",
        "bits_per_byte_standard_error": "bits per byte",
    }
    unit = next((unit for end, unit in units_by_end.items() if metric.field.endswith(end)), None)
    return f"a bare number of {unit}" if unit else "a bare number, without a unit"
