"""A line a technique: what it saved and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from membench.errors import one_line
from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import Comparison
from membench.records.metric import Metric
from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.report.cells import bound_of_ratio
from membench.report.text import is_shown
from membench.units import format_difference, format_divergence, format_ratio


def verdicts(records: Sequence[Record]) -> list[str]:
    """Return a line per technique: what it saved and what it cost, as the range of the ratios over its cases.

    Changes that cannot be told from none are left out: a ratio within run-to-run variation, a value closer to the
    reference's than the error of either, a bound on the wrong side, and after training a gain of quality, because its
    standard error is that of the text and not of the training. If data are only read, the time per token counts, not
    that of an epoch, which is shorter for less text. If nothing else measures quality, the divergence of the logits
    from the reference's is a cost.
    """
    found = Comparison([record for record in records if record.status == "ok"])
    shown_in = {
        metric: [
            group
            for group in found.groups
            if is_shown(found, group, metric) and not _is_of_an_epoch(found, group, metric)
        ]
        for metric in METRICS
        if metric.in_table
    }
    lines = []
    for technique in dict.fromkeys(t for group in found.groups for t in found.techniques(group) if t != REFERENCE):
        said: dict[str, list[str]] = {"saved": [], "cost": [], "mixed": []}
        groups = [group for group in found.groups if found.repeats(group, technique)]
        if not any(found.repeats(group, REFERENCE) for group in groups):
            lines.append(f"{technique}: nothing to compare with: '{REFERENCE}' was not measured to its end")
            continue
        for metric, where in shown_in.items():
            if metric.in_table == "where it needs more":
                where = [group for group in where if found.needs_more_in(group, technique, metric.field)]
            reached = ratios_of(found, where, technique, metric)
            told = [ratio.gains for ratio in reached if ratio.tells]
            if told:
                values = [ratio.value for ratio in reached]
                shown = " to ".join(dict.fromkeys((format_ratio(min(values)), format_ratio(max(values)))))
                said[_kind(told)].append(f"{metric.title} {shown}")
        lost = [round(loss, 4) for loss in _losses_of(found, groups, technique, "lost_bits_per_byte")]
        if any(lost):
            shown = " to ".join(dict.fromkeys(format_difference(value) for value in (min(lost), max(lost))))
            said[_kind([loss < 0 for loss in lost if loss])].append(f"{shown} bits/byte")
        by_logits = [group for group in groups if found.quality_field(group) == "kl_nats"]
        far = [distance for distance in _losses_of(found, by_logits, technique, "kl_nats") if distance]
        if far:
            shown = " to ".join(dict.fromkeys(format_divergence(distance) for distance in (min(far), max(far))))
            said["cost"].append(f"KL {shown}")
        points = [found.difference(group, technique, "accuracy_percent") for group in groups]
        known = [point for point in points if point is not None]
        told = [loss < 0 for loss in _losses_of(found, groups, technique, "accuracy_percent") if loss]
        if told:
            shown = " to ".join(dict.fromkeys(f"{point:+.1f}" for point in (min(known), max(known))))
            said[_kind(told)].append(f"{shown} percent of samples")
        kept = [
            value for group in groups if (value := found.value(group, technique, "corpus_kept_percent")) is not None
        ]
        if kept:
            shown = " to ".join(dict.fromkeys(f"{100 - value:.3g}" for value in (max(kept), min(kept))))
            said["cost"].append(f"{shown} percent of the text")
        mixed = f"; depends on the case: {', '.join(said['mixed'])}" if said["mixed"] else ""
        saved, cost = (", ".join(said[kind]) or "nothing" for kind in ("saved", "cost"))
        lines.append(f"{technique}: saved {saved}; cost {cost}{mixed}")
    return [one_line(line) for line in lines]


def _is_of_an_epoch(found: Comparison, group: Group, metric: Metric) -> bool:
    """Whether a metric is the time of an epoch, and the time per token is known, too."""
    return metric.field == "step_median_s" and found.reads_only(group) and found.is_known(group, "tokens_per_s")


class Ratio(NamedTuple):
    value: float
    gains: bool
    tells: bool
    """Whether it can be told from no change."""


def ratios_of(found: Comparison, groups: Sequence[Group], technique: str, metric: Metric) -> list[Ratio]:
    """Return a metric's ratios to the reference, for each group that has one."""
    ratios = []
    for group in groups:
        value = found.ratio(group, technique, metric.field)
        if value is None:
            continue
        gains = value < 1 if metric.better == "lower" else value > 1
        bound = bound_of_ratio(found, group, technique, metric, REFERENCE)
        is_chance = gains and metric.gains_by_chance and found.value(group, technique, "final_loss_nats") is not None
        tells = (
            abs(value - 1) > metric.same_within
            and not found.is_within_error(group, technique, REFERENCE, metric.field)
            and bound != "~"
            and not (bound == "≤" and value > 1)
            and not (bound == "≥" and value < 1)
            and not is_chance
        )
        ratios.append(Ratio(value, gains, tells))
    return ratios


def _losses_of(found: Comparison, groups: Sequence[Group], technique: str, field: str) -> list[float]:
    losses = [found.lost(group, technique, field) for group in groups]
    return [loss for loss in losses if loss is not None]


def _kind(gains: Sequence[bool]) -> str:
    return "saved" if all(gains) else "mixed" if any(gains) else "cost"
