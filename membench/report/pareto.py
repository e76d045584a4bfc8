"""Memory against quality, as a picture: which techniques nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import Comparison
from membench.records.highest_peak import RUNNING
from membench.records.metric import Loss, Metric
from membench.records.metrics import METRIC_OF_FIELD, NO_DIVERGENCE
from membench.report.cells import figure, signed
from membench.report.drawing import Cloud, Point, Tick, listed
from membench.units import byte_unit

_MOST_DRAWN = 60

_TIMES = (("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def drawn(found: Comparison, group: Group) -> list[str]:
    """The techniques that a group's pictures show: all, or of very many the reference, the front, and the smallest."""
    techniques = found.techniques(group)
    if len(techniques) <= _MOST_DRAWN:
        return techniques
    front = found.front(group, RUNNING)

    def rank(technique: str) -> tuple[bool, bool, float]:
        live = found.value(group, technique, "peak_live_bytes")
        return technique != REFERENCE, technique not in front, float("inf") if live is None else live

    chosen = set(sorted(techniques, key=rank)[:_MOST_DRAWN])
    return [technique for technique in techniques if technique in chosen]


def left_out_of(found: Comparison, group: Group) -> str:
    """A sentence on the techniques that pictures do not show; nothing where they show all."""
    measured = len(found.techniques(group))
    if measured <= _MOST_DRAWN:
        return ""
    return f" Of {measured} techniques {_MOST_DRAWN} are drawn: the front and those with the least live memory."


def pareto(found: Comparison, group: Group) -> Cloud:
    """Live memory of running against what quality is lost; against time, where the group's quality is not known."""
    quality = found.quality_field(group)
    front = found.front(group, RUNNING)
    placed: list[tuple[str, float, float, float]] = []
    left_out: list[str] = []
    untold: dict[str, list[str]] = {}
    for technique in drawn(found, group):
        live, pace_s = found.value(group, technique, "peak_live_bytes"), found.pace_s(group, technique)
        lost = found.lost(group, technique, quality) if quality else pace_s
        why = found.why_untold(group, found.speed_field(group), technique)
        has_speed = pace_s is not None or why is not None
        if live is None or not has_speed or lost is None or not _is_ok(found, group, technique):
            left_out.append(technique)
        else:
            if why is not None:
                untold.setdefault(why, []).append(technique)
            placed.append((technique, lost, live, 1 / pace_s if pace_s else 0.0))
    unit, step = byte_unit(max((live for _, _, live, _ in placed), default=0.0))
    x_title, where, ticks = _axis([lost for _, lost, _, _ in placed], quality, found.speed_field(group))
    fastest = max((speed for _, _, _, speed in placed), default=0.0) or 1.0
    points = tuple(
        Point(technique, where(lost), live / step, speed / fastest, technique in front,
              _told(found, group, technique, quality))
        for technique, lost, live, speed in placed
    )  # fmt: skip
    metrics = _metrics_of(found, group, quality)
    rows = (
        (
            name,
            *(figure(found, group, name, metric) for metric in metrics),
            "on the front while running" if name in front else "",
        )
        for name in (point.technique for point in points)
    )
    table = (("technique", *(metric.title for metric in metrics), "Pareto"), *rows)
    caption = _caption_of_cloud(found, group, points, left_out) + left_out_of(found, group)
    for why, names in untold.items():
        caption += f" Drawn smallest, because {why} and the time says nothing: {listed(names)}."
    against = _loss(quality).what if quality else "time"
    return Cloud(
        f"Memory against {against}", caption, x_title, f"live peak, {unit}", ticks, points, _lowest(points), table
    )


def _loss(quality: str) -> Loss:
    loss = METRIC_OF_FIELD[quality].loss
    assert loss is not None, f"{quality} tells no quality"
    return loss


def _is_ok(found: Comparison, group: Group, technique: str) -> bool:
    return all(record.status == "ok" for record in found.repeats(group, technique))


def _metrics_of(found: Comparison, group: Group, quality: str | None) -> list[Metric]:
    """What is told of each point."""
    fields = ("peak_live_bytes", found.speed_field(group), *([quality] if quality else ()))
    return [METRIC_OF_FIELD[field] for field in fields]


def _told(found: Comparison, group: Group, technique: str, quality: str | None) -> str:
    metrics = _metrics_of(found, group, quality)
    return "; ".join(f"{metric.title} {figure(found, group, technique, metric)}" for metric in metrics)


def _axis(
    values: Sequence[float], quality: str | None, speed: str
) -> tuple[str, Callable[[float], float], tuple[Tick, ...]]:
    """The axis' title, where on it a value lies, and its ticks where they are not those of the values themselves.

    Losses go over many orders of magnitude: their axis is a logarithm, with a place of its own for none at all.
    """
    if quality is None:
        longest = max(values, default=0.0)
        unit, step = next((known for known in _TIMES if longest >= known[1]), _TIMES[-1])
        if speed == "tokens_per_s":  # of reading, which has no quality
            return f"time of a token, {unit}", (lambda value: value / step), ()
        return f"time of a step, {unit} (quality is not known)", (lambda value: value / step), ()
    title = _loss(quality).axis
    if quality == "accuracy_percent":
        return title, (lambda value: value), ()
    known = [math.log10(value) for value in values if value > 0]
    first, last = (math.floor(min(known)), math.ceil(max(known))) if known else (-4, -4)
    nothing = first - 1
    decades = range(first, max(last, first) + 1) if known else ()
    nothing_told = f"below {NO_DIVERGENCE:g}" if quality == "kl_nats" else "none beyond chance"
    ticks = (Tick(nothing, nothing_told), *(Tick(decade, f"{10.0**decade:g}") for decade in decades))
    return title, (lambda value: math.log10(value) if value > 0 else float(nothing)), ticks


def _lowest(points: Sequence[Point]) -> tuple[tuple[float, float], ...]:
    """From left to right, the points below all to their left."""
    chosen: list[tuple[float, float]] = []
    for x, y in sorted((point.x, point.y) for point in points):
        if not chosen or y < chosen[-1][1]:
            chosen.append((x, y))
    return tuple(chosen)


def _caption_of_cloud(found: Comparison, group: Group, points: Sequence[Point], left_out: Sequence[str]) -> str:
    if not points:
        if any(_is_ok(found, group, technique) for technique in found.techniques(group)):
            return "Nothing to place: of no case of this group live memory and what it is drawn against are both known."
        return "Nothing to place: no case of this group was measured to its end."
    least = min(points, key=lambda point: point.y).technique
    front = [point.technique for point in points if point.on_front]
    shown = signed(found, group, least, METRIC_OF_FIELD["peak_live_bytes"])
    left = {
        None: f"the less time a {'token' if found.speed_field(group) == 'tokens_per_s' else 'step'} takes",
        "kl_nats": "the nearer the logits are to the reference's (quality itself is not known)",
    }.get(found.quality_field(group), "the less quality is lost")
    said = [
        f"The further down, the less memory; the further left, {left}; the larger, the faster.",
        f"The least live memory at its peak has {least} ({shown}).",
        f"Filled: on the front by the live peak while running ({listed(front)})." if front else "",
        *_of_other_phases(found, group, [point.technique for point in points], front),
        "The dotted line joins what no other has less of both of.",
        f"Not drawn, for want of a figure: {listed(left_out)}." if left_out else "",
    ]
    return " ".join(filter(None, said))


def _of_other_phases(found: Comparison, group: Group, techniques: Sequence[str], front: Sequence[str]) -> Sequence[str]:
    """Sentences on techniques that need more before running, and on the front by the highest peak, if it is another."""
    before = {technique: found.needed_before(group, technique) for technique in techniques}
    more = [f"{technique} ({peak})" for technique, peak in before.items() if peak is not None]
    by_highest = [technique for technique in techniques if technique in found.front(group)]
    said = []
    if more or by_highest != front:
        said.append("All this is of the live peak while running.")
    if more:
        said.append(f"Before that, more is needed than the reference ever takes: {listed(more)}.")
    if by_highest != front:
        said.append(f"By the highest peak of all phases the front is: {listed(by_highest)}.")
    return said
