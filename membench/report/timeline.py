"""One case's memory over time, as a picture: samples, phases, and the exact peaks that samples miss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from membench.protocol.readings import LAUNCHED_RANK, Baseline, PhaseReading, ProcessReading
from membench.records.record import Record
from membench.report.drawing import Span, Timeline
from membench.report.outcomes import end_of
from membench.units import byte_unit, format_bytes, format_seconds

_BUCKETS = 60
_WIDE_BRACKET = 0.01
"""As for metrics: a peak that may be off by more than this share of it is a bound."""

_NO_PROCESS = ProcessReading(role="worker", rank=0, device="", phases=())

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
    ranks = [process for process in record.processes if process.role != LAUNCHED_RANK] or [_NO_PROCESS]
    baseline, is_known = _baseline_of_all(ranks), all(process.baseline for process in ranks)
    spans = _spans(ranks)
    phases = [span.phase for span in spans]
    # Before the first phase there is no baseline yet.
    since = spans[0].began_s if spans else 0.0
    all_at: Sequence[float] = record.timeline.get("at_s", ())
    kept = [number for number, at in enumerate(all_at) if at >= since]
    columns = {
        name: [None if column[n] is None else column[n] - sum(getattr(baseline, part) for part in parts) for n in kept]
        for field, (name, parts) in _COLUMNS.items()
        if any(column := record.timeline.get(field, ()))
    }
    shown = _thinned(columns, len(kept))
    drawn = _side_by_side(phases)
    own = [process.baseline.file_bytes if process.baseline else 0 for process in ranks]
    peaks = [_peak_of_all(span.of_ranks, own) for span in spans]
    sampled = [value for column in columns.values() for value in column if value is not None]
    unit, step = byte_unit(max([0.0, *sampled, *(peak.size_bytes or 0.0 for peak in peaks)]))
    has_gpu = any(name.startswith("GPU") for name in columns)
    which = f", repeat {record.repeat + 1} of {repeats}" if repeats > 1 else ""
    return Timeline(
        f"Memory of {record.id} over time{which}",
        _caption(record, peaks, len(kept), len(shown), _counted_from(is_known, has_gpu, len(ranks))),
        unit, f"{unit} above {_whose(len(ranks))}" if is_known and not has_gpu else unit,
        tuple(round(all_at[kept[n]], 3) for n in shown),
        {name: tuple(_rounded(column[n], step) for n in shown) for name, column in columns.items()},
        tuple(
            Span(peak.phase, span.phase.allocator, round(span.began_s, 3), round(span.ended_s, 3),
                 _rounded(peak.size_bytes, step), peak.is_bound, peak.told)
            for span, peak in zip(spans, peaks, strict=True)
            if span.phase.name in drawn
        ),
        (("phase", "allocator", "took", "peak"),
         *((peak.phase, span.phase.allocator, format_seconds(span.ended_s - span.began_s), peak.told)
           for span, peak in zip(spans, peaks, strict=True))),
    )  # fmt: skip


class _Span(NamedTuple):
    phase: PhaseReading
    """Of the first rank that went through it."""
    began_s: float
    ended_s: float
    of_ranks: Mapping[int, PhaseReading]
    """By the number of the rank."""


def _spans(ranks: Sequence[ProcessReading]) -> list[_Span]:
    """Return the phases that were seen from begin to end, each from its first begin on a rank to its last end."""
    by_name: dict[str, dict[int, PhaseReading]] = {}
    for number, process in enumerate(ranks):
        for phase in process.phases:
            if _seen(phase):
                by_name.setdefault(phase.name, {})[number] = phase
    found = []
    for of_ranks in by_name.values():
        began_s, ended_s = zip(*(seen for phase in of_ranks.values() if (seen := _seen(phase))), strict=True)
        found.append(_Span(next(iter(of_ranks.values())), min(began_s), max(ended_s), of_ranks))
    return found


def _baseline_of_all(ranks: Sequence[ProcessReading]) -> Baseline:
    """Return the sum of the ranks' baselines, as their samples are summed."""
    known = [process.baseline or Baseline() for process in ranks]
    return Baseline(sum(each.anonymous_bytes for each in known), sum(each.file_bytes for each in known))


def _seen(phase: PhaseReading) -> tuple[float, float] | None:
    """When a phase began and ended, if the observer saw both."""
    return None if phase.began_s is None or phase.ended_s is None else (phase.began_s, phase.ended_s)


def _side_by_side(phases: Sequence[PhaseReading]) -> Sequence[str]:
    """The outermost phases; where others lie in one of them, as in the whole of a script, those in its place."""
    outer = {phase.inside for phase in phases if phase.inside}
    outermost = [phase.name for phase in phases if not phase.inside]
    return [
        phase.name for phase in phases
        if (phase.inside in outermost) or (not phase.inside and phase.name not in outer)
    ]  # fmt: skip


def _rounded(size_bytes: float | None, step: int) -> float | None:
    return None if size_bytes is None else round(size_bytes / step, 3)


class _Peak(NamedTuple):
    phase: str
    size_bytes: float | None
    what: str
    is_bound: bool
    told: str


def _peak_of_all(of_ranks: Mapping[int, PhaseReading], baseline_file_bytes: Sequence[int]) -> _Peak:
    """Return the peak of a phase; of several ranks the sum of their peaks, which they need not reach at once."""
    peaks = [_peak(phase, baseline_file_bytes[number]) for number, phase in of_ranks.items()]
    known = [peak.size_bytes for peak in peaks if peak.size_bytes is not None]
    if len(baseline_file_bytes) == 1:
        return peaks[0]
    if len(known) < len(baseline_file_bytes):  # what the other ranks held meanwhile is not known
        return peaks[0]._replace(size_bytes=None, told="–")
    return peaks[0]._replace(
        size_bytes=sum(known), is_bound=True, told=f"≤{format_bytes(sum(known))} {peaks[0].what} of {len(peaks)} ranks"
    )


def _peak(phase: PhaseReading, baseline_file_bytes: int) -> _Peak:
    """A phase's peak by the kernel's or torch's counters, of what counts there: live memory or footprint."""
    if phase.reads_gpu_itself:
        size, what = phase.cuda_peak_allocated_bytes, "allocated"
    elif phase.allocator != "pinned":
        # That of the process itself, as its line is; its children have a line of their own.
        size = phase.own_peak_bytes if phase.bound == "at least" else phase.peak_footprint_bytes
        what = "footprint"
    else:
        size, what = phase.peak_live_bytes, "live"
    if size is None:
        return _Peak(phase.name, None, what, False, "–")
    if what == "live":
        is_bound = size - _at_least(phase, baseline_file_bytes) > _WIDE_BRACKET * max(size, 1)
    else:
        # A program may never have reached what it was forked from.
        is_bound = what == "footprint" and phase.bound == "at most"
    return _Peak(phase.name, size, what, is_bound, f"{'≤' if is_bound else ''}{format_bytes(size)} {what}")


def _at_least(phase: PhaseReading, baseline_file_bytes: int) -> float:
    """What live memory surely reached: the kernel's peak holds file pages, too, and some came and went unseen."""
    looked_at = phase.file_most_bytes
    if looked_at is None:
        looked_at = max(phase.file_start_bytes or 0, phase.file_end_bytes or 0)
    passing = max(0, (phase.file_peak_bytes or 0) - baseline_file_bytes - looked_at)
    sure = phase.peak_live_at_least_bytes
    if sure is None:  # an early record
        sure = phase.peak_live_bytes or 0
    return max(0, sure - passing)


def _caption(record: Record, peaks: Sequence[_Peak], samples: int, shown: int, counted_from: str) -> str:
    if not samples and not peaks:
        return f"{record.id} ended as {record.status} before anything was seen of its memory."
    said = [f"{record.id} took {format_seconds(record.duration_s)} and ended as {end_of(record)}."]
    said += _highest(peaks)
    said.append("Lines are samples; bars are phases' exact peaks, which hold what was too short for a sample, too.")
    if any(peak.is_bound for peak in peaks):
        why = "file pages came and went meanwhile"
        if any(process.rank for process in record.processes):
            why = "the sum of the ranks' peaks, which need not fall together"
        elif any(peak.is_bound and peak.what == "footprint" for peak in peaks):
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


def _counted_from(is_known: bool, has_gpu: bool, ranks: int) -> str:
    if not is_known:
        return "Sizes are whole, the baseline is not known."
    if has_gpu:
        return f"Sizes of main memory are above {_whose(ranks)}, the GPU's are whole or above idle."
    return f"Sizes are above {_whose(ranks)}."


def _whose(ranks: int) -> str:
    return "the worker's baseline" if ranks == 1 else f"the baselines of {ranks} ranks, summed"


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
