"""Memory by technique, as bars: what is held, what converting takes, what the highest moment is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from membench.protocol.case import Group
from membench.protocol.readings import ProcessReading
from membench.records.comparison import Comparison
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.ranks import ranks_of
from membench.report.cells import bound_of, figure, signed
from membench.report.drawing import Bars, Estimates, Series, listed
from membench.report.pareto import drawn, left_out_of
from membench.units import byte_unit, format_bytes


def memory(found: Comparison, group: Group, estimates: Comparison | None = None) -> tuple[Bars, ...]:
    """Weights, live and footprint peak by technique, each with its ratio to the reference; those that are known.

    Args:
        estimates: estimates of the same cases, if there are some.
    """
    fields = ("weights_bytes", "peak_live_bytes", "peak_footprint_bytes")
    names = drawn(found, group)
    return tuple(
        _bars_of(found, group, METRIC_OF_FIELD[field], names, estimates)
        for field in fields
        if any(found.value(group, name, field) is not None for name in names)
    )


def _bars_of(
    found: Comparison, group: Group, metric: Metric, names: Sequence[str], estimates: Comparison | None
) -> Bars:
    known = [name for name in names if found.value(group, name, metric.field) is not None]
    values = [found.value(group, name, metric.field) or 0.0 for name in known]
    unit, step = byte_unit(max(values))
    least, most = known[values.index(min(values))], known[values.index(max(values))]
    told = tuple(figure(found, group, name, metric) for name in known)
    caption = f"{metric.meaning.capitalize()}."
    if len(known) > 1:
        first, last = (signed(found, group, name, metric) for name in (least, most))
        caption += f" From {first} ({least}) to {last} ({most})."
    unknown = [name for name in names if name not in known]
    if unknown:
        caption += f" Not known of {listed(unknown)}."
    columns: list[Sequence[str]] = [known, told]
    head = ["technique", metric.title]
    lines: Estimates | None = None
    estimated = [None if estimates is None else estimates.value(group, name, metric.field) for name in known]
    if any(value is not None for value in estimated):
        said = tuple(_estimate_told(*pair, metric) for pair in zip(estimated, values, strict=True))
        lines = Estimates(tuple(None if value is None else value / step for value in estimated), said)
        caption += " The lines are estimates, made without running."
        head.append("estimated")
        columns.append(said)
    return Bars(
        metric.title, caption + left_out_of(found, group), unit, tuple(known),
        (Series(metric.title, tuple(value / step for value in values), told),), False,
        (tuple(head), *zip(*columns, strict=True)), lines,
    )  # fmt: skip


def _estimate_told(estimated: float | None, measured: float, metric: Metric) -> str:
    """Return an estimate with how far it is above what was measured."""
    if estimated is None:
        return "–"
    off = f" ({(estimated / measured - 1) * 100:+.1f}%)" if measured > 0 else ""
    return metric.format(estimated) + off


_RUNNING = ("peak_live_bytes", "running")
_PREPARING = (
    ("load_peak_live_bytes", "loading"),
    ("apply_peak_live_bytes", "converting"),
    ("store_peak_live_bytes", "packing training data"),
)


_NO_MORE_BEFORE = (
    "No technique needs more live memory before the first step than while running, by more than the figures may be off."
)


def conversion(found: Comparison, group: Group) -> Bars | None:
    """Live peaks of what comes before a step beside that of running; ``None`` where none is known."""
    fields = [(field, name) for field, name in (*_PREPARING, _RUNNING) if found.is_known(group, field)]
    names = [name for name in drawn(found, group)
             if any(found.value(group, name, field) is not None for field, _ in fields)]  # fmt: skip
    if not names:
        return None
    highest = max(found.value(group, name, field) or 0.0 for name in names for field, _ in fields)
    unit, step = byte_unit(highest)
    series, rows = [], []
    for field, title in fields:
        values = [found.value(group, name, field) for name in names]
        told = tuple(signed(found, group, name, METRIC_OF_FIELD[field]) for name in names)
        series.append(Series(title, tuple(None if value is None else value / step for value in values), told))
    seconds = ("apply_s", "step_median_s")
    for number, name in enumerate(names):
        times = [figure(found, group, name, METRIC_OF_FIELD[field]) for field in seconds]
        rows.append((name, *(one.told[number] for one in series), *times))
    dearer, untold = [], []
    for name in names:
        told_by = _needs_more_before(found, group, name)
        if told_by is None:
            untold.append(name)
        elif told_by:
            before, running = (signed(found, group, name, METRIC_OF_FIELD[field]) for field in (told_by, _RUNNING[0]))
            dearer.append(f"{name} ({before} before, {running} while running)")
    said = []
    if dearer:
        said.append(f"What comes before the first step needs more live memory than running does: {listed(dearer)}.")
    if untold:
        said.append(f"It is not known of: {listed(untold)}.")
    elif not dearer:
        said.append(_NO_MORE_BEFORE)
    caption = " ".join(said)
    head = ("technique", *(f"{title}, live peak" for _, title in fields), "converting, time", "a step, time")
    return Bars(
        "Converting against running",
        caption + left_out_of(found, group),
        unit,
        tuple(names),
        tuple(series),
        False,
        (head, *rows),
    )


def _needs_more_before(found: Comparison, group: Group, technique: str) -> str | None:
    """The metric of what surely takes more than running does; empty if none does, ``None`` if that cannot be told."""
    running = found.value(group, technique, _RUNNING[0])
    of_running = bound_of(found, group, technique, METRIC_OF_FIELD[_RUNNING[0]])
    before = {
        field: value for field, _ in _PREPARING if (value := found.value(group, technique, field)) is not None
    }  # fmt: skip
    if not before:
        return ""
    if running is None:
        return None
    bounds = {field: bound_of(found, group, technique, METRIC_OF_FIELD[field]) for field in before}
    off = found.resolution(group, technique, _RUNNING[0])
    more = [
        field for field, value in before.items() if value - found.resolution(group, technique, field) > running + off
    ]
    sure = [field for field in more if bounds[field] != "≤"] if of_running != "≥" else []
    if sure:
        return max(sure, key=lambda field: before[field])
    return None if more or "≥" in bounds.values() or of_running == "≤" else ""


CATEGORIES = ("weights", "gradients", "optimizer", "activations", "cache", "communication", "other")
"""What memory at the peak is told apart into."""


NO_BREAKDOWN = (
    "What held the memory is looked at between the parts of a step, of training or generating. No case here has such"
    " parts and came that far."
)


def breakdown(found: Comparison, group: Group) -> Bars | None:
    """What held live memory at the highest moment of a step; ``None`` where ``NO_BREAKDOWN`` says why.

    Of a case's repeats the first is shown: a median of each part would be of no moment that there was.
    """
    parts: dict[str, tuple[str, Mapping[str, float]]] = {}
    names = drawn(found, group)
    for technique in names:
        for record in found.repeats(group, technique)[:1]:
            process = record.process_of(_RUNNING[0]) if record.processes else None
            if process is not None and (held := _held(process)):
                parts[technique] = (str(process.peak_part), held)
    if not parts:
        return None
    unit, series = _stacked([sizes for _, sizes in parts.values()])
    said = []
    for technique in list(parts)[:1] + sorted(list(parts)[1:], key=lambda name: sum(parts[name][1].values()))[:1]:
        part, sizes = parts[technique]
        whole = sum(sizes.values()) or 1
        largest = sorted(sizes, key=lambda category: -sizes[category])[:3]
        shares = ", ".join(f"{category} {sizes[category] / whole:.0%}" for category in largest if sizes[category])
        said.append(f"{technique}, {format_bytes(whole)} in {part}: {shares}")
    caption = f"At the highest moment of a step. {'; '.join(said)}. 'other' is what no walk over storages finds."
    if any(len(found.repeats(group, name)) > 1 for name in parts):
        caption += " Of several repeats the first is drawn."
    missing = [name for name in names if name not in parts]
    if missing:
        caption += f" Not known of {listed(missing)}."
    rows = tuple(
        (technique, parts[technique][0], *(one.told[number] for one in series))
        for number, technique in enumerate(parts)
    )
    table = (("technique", "part of a step", *(one.name for one in series)), *rows)
    return Bars("What held the memory", caption + left_out_of(found, group), unit, tuple(parts), series, True, table)


def ranks(found: Comparison, group: Group) -> Bars | None:
    """What held live memory on each rank at its own highest moment of a step; ``None`` where no case is in ranks."""
    held: dict[tuple[str, int], tuple[str, Mapping[str, float]]] = {}
    names = drawn(found, group)
    for technique in names:
        for record in found.repeats(group, technique)[:1]:
            for process in ranks_of(record):
                if sizes := _held(process):
                    held[technique, process.rank] = (str(process.peak_part), sizes)
    if not held:
        return None
    unit, series = _stacked([sizes for _, sizes in held.values()])
    said = []
    for technique in dict.fromkeys(technique for technique, _ in held):
        peaks = {rank: sum(sizes.values()) for (of, rank), (_, sizes) in held.items() if of == technique}
        most, least = max(peaks, key=lambda rank: peaks[rank]), min(peaks, key=lambda rank: peaks[rank])
        lowest, highest = (f"{format_bytes(peaks[rank])} (rank {rank})" for rank in (least, most))
        said.append(f"{technique} from {lowest} to {highest}")
    caption = f"Each rank at its own highest moment of a step: {listed(said)}."
    if any(len(found.repeats(group, technique)) > 1 for technique, _ in held):
        caption += " Of several repeats the first is drawn."
    rows = tuple(
        (technique, str(rank), part, *(one.told[number] for one in series))
        for number, ((technique, rank), (part, _)) in enumerate(held.items())
    )
    table = (("technique", "rank", "part of a step", *(one.name for one in series)), *rows)
    labels = tuple(f"{technique} · rank {rank}" for technique, rank in held)
    return Bars("What held the memory of each rank", caption + left_out_of(found, group), unit, labels, series, True,
                table)  # fmt: skip


def _held(process: ProcessReading) -> Mapping[str, float]:
    """Return what held the memory of a process at the highest moment of a step, by category; empty if not known."""
    return (process.breakdown_bytes or {}).get(process.peak_part or "", {})


def _stacked(wholes: Sequence[Mapping[str, float]]) -> tuple[str, tuple[Series, ...]]:
    """Return the unit and a series for each category, of bars that are each one of the wholes."""
    known = {category for sizes in wholes for category in sizes}
    looks = [*CATEGORIES, *sorted(known - set(CATEGORIES))]
    unit, step = byte_unit(max(sum(sizes.values()) for sizes in wholes))
    return unit, tuple(
        Series(category, tuple(sizes.get(category, 0) / step for sizes in wholes),
               tuple(format_bytes(sizes.get(category, 0)) for sizes in wholes), looks.index(category))
        for category in looks if category in known
    )  # fmt: skip
