"""Cells of tables: a value with its bound, its standard error and its ratio."""

from __future__ import annotations

from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import Comparison
from membench.records.metric import Metric
from membench.units import format_ratio

# A figure is marked as approximate if its source may be off by more than this share of it.
_COARSE = 0.05
SIGNS = {"at most": "≤", "at least": "≥", "about": "≈"}
_REVERSED = {"≤": "≥", "≥": "≤", "≈": "≈"}


def is_coarse(found: Comparison, group: Group, technique: str, metric: Metric) -> bool:
    """Whether the source of a value may be off by more than a twentieth of it."""
    value = found.value(group, technique, metric.field)
    return value is not None and found.resolution(group, technique, metric.field) > _COARSE * abs(value)


def figure(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """Format a value as a table shows it: with its bound, its standard error and its ratio to the reference."""
    if found.value(group, technique, metric.field) is None:
        return "–"
    shown = signed(found, group, technique, metric)
    if technique == REFERENCE or not metric.has_ratio:
        return shown
    return f"{shown} {change(found, group, technique, metric, REFERENCE)}".rstrip()


def signed(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """Format a value with its bound, its standard error and its rank; a dash if it is not known."""
    value = found.value(group, technique, metric.field)
    if value is None:
        return "–"
    shown = metric.format(value)
    if metric.loss is not None and metric.loss.error_field is not None:
        error = found.value(group, technique, metric.loss.error_field)
        shown += "" if error is None else f" ±{error:.4f}"
    if metric.names_rank and value > 1 + metric.same_within:
        named = (record.obtained.get(metric.field, {}) for record in found.repeats(group, technique))
        ranks = sorted({str(how["rank"]) for how in named if how.get("rank") is not None})
        shown += f" (rank {', '.join(ranks)})" if ranks else ""
    return f"{sign(found, group, technique, metric)}{shown}"


def change(found: Comparison, group: Group, technique: str, metric: Metric, base: str) -> str:
    """Format a metric against that of another case: the ratio, or the difference if a ratio has no meaning."""
    if metric.has_ratio:
        ratio = found.ratio(group, technique, metric.field, base)
        return "" if ratio is None else bound_of_ratio(found, group, technique, metric, base) + format_ratio(ratio)
    difference = found.difference(group, technique, metric.field, base)
    if difference is None or not metric.has_difference:
        return ""
    return f"{'-' if difference < 0 else '+'}{metric.format(abs(difference)).removeprefix('+')}"


def sign(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """Return the sign before a value that is a bound, approximate, or a time from which nothing follows."""
    is_rough = is_coarse(found, group, technique, metric) or found.is_untold(group, metric.field, technique)
    return bound_of(found, group, technique, metric) or ("~" if is_rough else "")


def bound_of(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """Return ``≤`` or ``≥`` if only a bound of a value is known, ``≈`` if it is an estimate, else nothing."""
    bounds = {record.obtained.get(metric.field, {}).get("bound") for record in found.repeats(group, technique)}
    return next((sign for bound, sign in SIGNS.items() if bound in bounds), "")


def bound_of_ratio(found: Comparison, group: Group, technique: str, metric: Metric, base: str) -> str:
    """Return the sign of a ratio of which a value is a bound; ``~`` if it says nothing.

    Two bounds may say nothing together, and a time that other processes disturbed, or of ranks that share one machine's
    cores, says nothing at all.
    """
    if found.is_untold(group, metric.field, technique, base):
        return "~"
    own, of = bound_of(found, group, technique, metric), bound_of(found, group, base, metric)
    reversed_of = _REVERSED.get(of, "")
    if own and reversed_of and own != reversed_of:
        return "~"
    return own or reversed_of
