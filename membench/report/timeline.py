"""One case's memory over time, as a picture: samples, phases, and the exact peaks that samples miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from membench.records.record import Record
from membench.report.drawing import Span, Timeline
from membench.units import byte_unit, format_bytes, format_seconds

_BUCKETS = 60
_WIDE_BRACKET = 0.01
"""As for metrics: a peak that may be off by more than this share of it is a bound."""

_COLUMNS = {
    "rss_bytes": ("resident", ("anonymous_bytes", "file_bytes")),
    "anonymous_bytes": ("anonymous", ("anonymous_bytes",)),
    "children_unique_bytes": ("children", ()),
    "gpu_process_bytes": ("GPU, process", ()),
    "gpu_used_above_idle_bytes": ("GPU, above idle", ()),
}
"""Of each column of samples: its name, and what of the worker's baseline is in it."""


def timeline(record: Record, repeats: int = 1) -> Timeline:
    """A case's samples with its phases and their exact peaks; all above the worker's baseline, where that is known.

    Args:
        repeats: how many records there are of the case.
    """
    process: Mapping[str, Any] = record.processes[0] if record.processes else {}
    baseline = process.get("baseline") or {}
    phases = [phase for phase in process.get("phases", ()) if "began_s" in phase and "ended_s" in phase]
    # Before the first phase there is no baseline yet.
    since = phases[0]["began_s"] if phases else 0.0
    all_at: Sequence[float] = record.timeline.get("at_s", ())
    kept = [number for number, at in enumerate(all_at) if at >= since]
    columns = {
        name: [None if column[n] is None else column[n] - sum(baseline.get(part, 0) for part in parts) for n in kept]
        for field, (name, parts) in _COLUMNS.items()
        if any(column := record.timeline.get(field, ()))
    }
    shown = _thinned(columns, len(kept))
    drawn = _side_by_side([phase["name"] for phase in phases], process.get("role") == "script")
    peaks = [_peak(phase, baseline.get("file_bytes", 0)) for phase in phases]
    sampled = [value for column in columns.values() for value in column if value is not None]
    unit, step = byte_unit(max([0.0, *sampled, *(peak.size_bytes or 0.0 for peak in peaks)]))
    has_gpu = any(name.startswith("GPU") for name in columns)
    which = f", repeat {record.repeat + 1} of {repeats}" if repeats > 1 else ""
    return Timeline(
        f"Memory of {record.id} over time{which}",
        _caption(record, peaks, len(kept), len(shown), _counted_from(bool(baseline), has_gpu)),
        unit, f"{unit} above the worker's baseline" if baseline and not has_gpu else unit,
        tuple(round(all_at[kept[n]], 3) for n in shown),
        {name: tuple(_rounded(column[n], step) for n in shown) for name, column in columns.items()},
        tuple(
            Span(peak.phase, phase.get("allocator", ""), round(phase["began_s"], 3), round(phase["ended_s"], 3),
                 _rounded(peak.size_bytes, step), peak.is_bound, peak.told)
            for phase, peak in zip(phases, peaks, strict=True)
            if phase["name"] in drawn
        ),
        (("phase", "allocator", "took", "peak"),
         *((peak.phase, str(phase.get("allocator", "")), format_seconds(phase["ended_s"] - phase["began_s"]), peak.told)
           for phase, peak in zip(phases, peaks, strict=True))),
    )  # fmt: skip


def _side_by_side(names: Sequence[str], of_program: bool) -> Sequence[str]:
    """The phases that lie in no other: a user's program has the whole first, and those it marks may be nested."""
    if not of_program or len(names) < 2:
        return names
    marked = names[1:]
    return [name for name in marked if not any(name.startswith(f"{outer}.") for outer in marked)]


def _rounded(size_bytes: float | None, step: int) -> float | None:
    return None if size_bytes is None else round(size_bytes / step, 3)


class _Peak(NamedTuple):
    phase: str
    size_bytes: float | None
    what: str
    is_bound: bool
    told: str


def _peak(phase: Mapping[str, Any], baseline_file_bytes: int) -> _Peak:
    """A phase's peak by the kernel's or torch's counters, of what counts there: live memory or footprint."""
    if "cuda_peak_allocated_bytes" in phase:
        size, what = phase["cuda_peak_allocated_bytes"], "allocated"
    elif phase.get("allocator") == "default":
        # Of a user's program that of itself, as its line is; its children have a line of their own.
        size, what = phase.get("own_peak_bytes", phase.get("peak_footprint_bytes")), "footprint"
    else:
        size, what = phase.get("peak_live_bytes"), "live"
    if size is None:
        return _Peak(phase["name"], None, what, False, "–")
    if what == "live":
        is_bound = size - _at_least(phase, baseline_file_bytes) > _WIDE_BRACKET * max(size, 1)
    else:
        # A program may never have reached what it was forked from.
        is_bound = what == "footprint" and "own_peak_bytes" not in phase and phase.get("bound") == "at most"
    return _Peak(phase["name"], size, what, is_bound, f"{'≤' if is_bound else ''}{format_bytes(size)} {what}")


def _at_least(phase: Mapping[str, Any], baseline_file_bytes: int) -> float:
    """What live memory surely reached: the kernel's peak holds file pages, too, and some came and went unseen."""
    looked_at = phase.get("file_most_bytes")
    if looked_at is None:
        looked_at = max(phase.get("file_start_bytes") or 0, phase.get("file_end_bytes") or 0)
    passing = max(0, (phase.get("file_peak_bytes") or 0) - baseline_file_bytes - looked_at)
    sure: float = phase.get("peak_live_at_least_bytes", phase["peak_live_bytes"])
    return max(0, sure - passing)


def _caption(record: Record, peaks: Sequence[_Peak], samples: int, shown: int, counted_from: str) -> str:
    if not samples and not peaks:
        return f"{record.id} ended as {record.status} before anything was seen of its memory."
    said = [f"{record.id} took {format_seconds(record.duration_s)} and ended as {record.status}."]
    said += _highest(peaks)
    said.append("Lines are samples; bars are phases' exact peaks, which hold what was too short for a sample, too.")
    if any(peak.is_bound for peak in peaks):
        why = "file pages came and went meanwhile"
        if any(peak.is_bound and peak.what == "footprint" for peak in peaks):
            why = "the program took no more than what it was forked from"
        said.append(f"A dotted bar is an upper bound: {why}.")
    said.append(counted_from)
    if shown < samples:
        said.append(f"Of {samples} samples the lowest and the highest of each stretch are drawn.")
    return " ".join(said)


def _highest(peaks: Sequence[_Peak]) -> list[str]:
    """Which phase took the most; of one with a bound alone only that it may have."""
    exact = [peak for peak in peaks if peak.size_bytes and not peak.is_bound]
    sure = max(exact, key=lambda peak: peak.size_bytes or 0.0, default=None)
    sure_bytes = (sure.size_bytes if sure else None) or 0.0
    more = [
        f"{peak.phase} may have taken {'more' if sure else 'the most'} ({peak.told})"
        for peak in peaks
        if peak.is_bound and (peak.size_bytes or 0.0) > sure_bytes
    ]
    told = [f"Of what is known exactly its highest phase is {sure.phase}: {sure.told}"] if sure and more else []
    if sure and not more:
        told = [f"Its highest phase is {sure.phase}: {sure.told}"]
    return [f"{'; '.join((*told, *more))}."] if told or more else []


def _counted_from(is_known: bool, has_gpu: bool) -> str:
    if not is_known:
        return "Sizes are whole, the baseline is not known."
    if has_gpu:
        return "Sizes of main memory are above the worker's baseline, the GPU's are whole or above idle."
    return "Sizes are above the worker's baseline."


def _thinned(columns: Mapping[str, Sequence[float | None]], samples: int) -> list[int]:
    """Which samples are drawn: all of a few; of many, each column's lowest and highest in each of some stretches."""
    if samples <= 4 * _BUCKETS:
        return list(range(samples))
    kept = {0, samples - 1}
    for bucket in range(_BUCKETS):
        stretch = range(bucket * samples // _BUCKETS, (bucket + 1) * samples // _BUCKETS)
        for column in columns.values():
            seen = sorted((value, number) for number in stretch if (value := column[number]) is not None)
            kept |= {number for _, number in (*seen[:1], *seen[-1:])}
    return sorted(kept)
