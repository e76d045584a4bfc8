"""What comparing reads of a run, and all that a baseline keeps of one."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict

from membench.errors import ResultsError, summary
from membench.host.device import Device
from membench.protocol.readings import ProcessReading
from membench.records.disturbance import counted_steps
from membench.records.disturbed_times import are_disturbed, counted
from membench.records.judged_text import judged_tokens
from membench.records.metrics import METRICS, PEAK_OF_PHASE, known_metric
from membench.records.record import Record, Status
from membench.records.run_file import Run
from membench.regression.noise import Noise

_AS_WRITTEN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_COMMIT_LENGTH = 12
_MEASURED_TO_THE_END = ("ok", "diverged")
_FROM_BAD_TO_WORSE = ("ok", "skipped", "diverged", "failed", "timeout", "out-of-memory", "crashed")

_MEDIANS = tuple(metric for metric in METRICS if metric.part and metric.role in ("time", "rate"))
"""Metrics that are the median of the durations of a step or of a part of it, or what is done in a step over it."""

_TOLD_BY_PHASE = tuple(phase for phase in PEAK_OF_PHASE if phase != "run")
"""Phases of which what is held afterwards tells where their peak comes from; of a step its parts tell that."""

_TIME = "step_median_s"

_LEAST_S, _MOST_S = 1e-9, 2.0**63
"""Of a step's duration: no clock tells less."""


@dataclass(frozen=True)
class Modules:
    """Layers of a model that are alike, and the bytes of their weights.

    ``modules``: a name, or one with ``*`` for the numbers in which their names differ.
    """

    __pydantic_config__ = _AS_WRITTEN

    modules: str
    count: int
    bytes: int


@dataclass(frozen=True)
class MeasuredCase:
    """One case over all its repeats.

    Attributes:
        status: of the worst repeat, with ``message`` and ``ended_in`` of that one; where most repeats came to their
            end, of the worst of these, and ``message`` says how many others there were.
        values: by metric field, that of each repeat that has one.
        reasons: by metric field, why it is not known.
        resolution_bytes: by metric field, how far off its source may be.
        bounds: by metric field, ``at least`` or ``at most`` where it is not exact.
        samples: by metric field, the single measurements (of steps) of each repeat, in the metric's unit.
        disturbed: the fields of times that other processes disturbed in all repeats: they support no verdict. Where
            some repeats were calm, ``values`` and ``samples`` are of these alone.
        waited_s: for how long the threads of each step waited for cores that others had, repeat by repeat; empty where
            that is not known of every one.
        breakdown_bytes: by part of a step and category, at the part's highest moment.
        peak_part: the part with the highest live peak.
        modules: what the weights are made of, the largest first. ``None``: the record does not say.
        phases: by phase, ``peak_live_bytes`` and ``held_live_bytes``.
        stands_for: what the names in the id stood for: ``model``, ``technique`` and ``workload``, each with options.
        device: on which it ran.
        judged_tokens: where there was no time to judge quality over all held-out text, the numbers of tokens over which
            it was judged, in ascending order; of several repeats those that differ.
    """

    __pydantic_config__ = _AS_WRITTEN

    id: str
    status: Status
    message: str | None = None
    ended_in: str | None = None
    values: Mapping[str, Sequence[int | float]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    resolution_bytes: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    waited_s: Sequence[Sequence[float]] = ()
    disturbed: Sequence[str] = ()
    breakdown_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    peak_part: str | None = None
    modules: Sequence[Modules] | None = None
    phases: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    stands_for: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    judged_tokens: Sequence[int] = ()

    @property
    def on_gpu(self) -> bool:
        return Device.parse(self.device).on_gpu

    @property
    def is_measured(self) -> bool:
        """Whether every repeat came to its end."""
        return self.status in _MEASURED_TO_THE_END

    def value(self, field: str) -> float | None:
        """The median over the repeats."""
        values = self.values.get(field)
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class CommitMeasured:
    """The commit of the code that was measured.

    Attributes:
        commit: its full id.
        is_changed: whether files that git tracks differed from it; ``None`` if that is not known.
        committed_at: when it was committed (ISO, UTC).
    """

    __pydantic_config__ = _AS_WRITTEN

    commit: str
    is_changed: bool | None = None
    committed_at: str | None = None

    @classmethod
    def of(cls, run: Run) -> CommitMeasured | None:
        """Return that of a run; ``None`` if its header does not say it."""
        code = run.header.get("code") or {}
        return cls(code["commit"], code.get("is_changed"), code.get("committed_at")) if code.get("commit") else None

    def __str__(self) -> str:
        """Return its short id, with '-dirty' as git does if files differed."""
        return f"{self.commit[:_COMMIT_LENGTH]}{'-dirty' if self.is_changed else ''}"


@dataclass(frozen=True)
class Measured:
    """A run or a baseline, as far as comparing needs it.

    Attributes:
        name: what it is called in tables and messages: a run's or a baseline's name.
        machine: as ``environment.describe`` says it.
        noise: of A/A repeats kept with a baseline, and of what a run's own repeats show, times aside.
        code: the commit of the code that was measured; ``None`` if it is not known.
    """

    __pydantic_config__ = _AS_WRITTEN

    name: str
    suite: str
    machine: Mapping[str, Any]
    measured_at: str
    cases: Mapping[str, MeasuredCase]
    noise: Noise = field(default_factory=Noise)
    code: CommitMeasured | None = None

    @property
    def on_gpu(self) -> bool:
        return any(case.on_gpu for case in self.cases.values())


def of_run(run: Run, name: str | None = None) -> Measured:
    """A run as it was read. What its own repeats show of noise is taken up.

    Raises:
        ResultsError: if a record holds something else than a run writes.
    """
    try:
        measured = of_records(run.records, name or str(run.header["run"]), str(run.header.get("suite", "")))
    except ResultsError as error:
        raise ResultsError(f"{run.path}: {error}") from None
    return dataclasses.replace(measured, code=CommitMeasured.of(run))


def of_records(records: Sequence[Record], name: str, suite: str = "") -> Measured:
    """Records that are at hand, of one machine; of the same case and repeat, all count as repeats.

    Raises:
        ResultsError: if a record holds something else than a run writes.
    """
    by_case: dict[str, list[Record]] = {}
    for record in records:
        by_case.setdefault(record.id, []).append(record)
    cases = {}
    for case_id, repeats in by_case.items():
        try:
            cases[case_id] = _case(case_id, repeats)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ResultsError(f"the record of {case_id} does not hold what a run writes: {summary(error)}") from None
    machine = records[0].machine if records else {}
    if not isinstance(machine, Mapping):
        raise ResultsError("its records do not say of which machine they are")
    return Measured(
        name,
        suite,
        machine,
        records[0].started_at if records else "",
        cases,
        Noise.of_values({case_id: _untimed(case) for case_id, case in cases.items()}),
    )


def _untimed(case: MeasuredCase) -> dict[str, Sequence[float]]:
    """What is no time: repeats of one run are too much alike to tell how far apart runs are."""
    known = {name: metric for name in case.values if (metric := known_metric(name)) is not None}
    return {name: case.values[name] for name, metric in known.items() if metric.depends_on != "time"}


def _case(case_id: str, repeats: Sequence[Record]) -> MeasuredCase:
    worst = max(repeats, key=_badness)
    measured = [record for record in repeats if record.status in _MEASURED_TO_THE_END]
    if 2 * len(measured) <= len(repeats) and worst not in measured:
        return MeasuredCase(case_id, worst.status, worst.message, worst.ended_in, reasons=dict(worst.reasons),
                            device=str(worst.case["device"]))  # fmt: skip
    message = worst.message
    if worst not in measured:
        message = f"{len(repeats) - len(measured)} of {len(repeats)} repeats ended as {worst.status}: {worst.message}"
        worst = max(measured, key=_badness)
    last = measured[-1]
    process = last.process_of("peak_live_bytes")
    fields = dict.fromkeys(name for record in measured for name in record.metrics)
    values: dict[str, list[float]] = {}
    for name in fields:
        for record in counted(measured, name):
            value = record.metrics[name]
            assert value is not None, "it counts"
            values.setdefault(name, []).append(value + 0)  # what is no number fails here
    modules = process.modules_bytes
    return MeasuredCase(
        case_id,
        worst.status,
        message,
        worst.ended_in,
        values,
        dict(last.reasons),
        {name: size for name in last.metrics if (size := _resolution(last, name))},
        _bounds(measured),
        _samples(measured),
        _waited_s(measured),
        [name for name in fields if are_disturbed(measured, name)],
        {part: dict(sizes) for part, sizes in (process.breakdown_bytes or {}).items()},
        process.peak_part,
        None if modules is None else [Modules(each.modules, each.count, each.bytes) for each in modules],
        _phases(process),
        _stands_for(last.case),
        str(last.case["device"]),
        judged_tokens(measured),
    )


def _badness(record: Record) -> int:
    return _FROM_BAD_TO_WORSE.index(record.status)


def _resolution(record: Record, name: str) -> int:
    """How far off a figure's source may be; early records say it of peaks alone."""
    how = record.obtained.get(name, {})
    if "resolution_bytes" in how or not str(how.get("source", "")).startswith(("Rss", "RSS")):
        return int(how.get("resolution_bytes", 0))
    return max((int(other.get("resolution_bytes", 0)) for other in record.obtained.values()), default=0)


def _bounds(measured: Sequence[Record]) -> dict[str, str]:
    """What is only a bound in most repeats."""
    found = collections.Counter(
        (name, str(how["bound"]))
        for record in measured
        for name, how in record.obtained.items()
        if how.get("bound") in ("at least", "at most")
    )
    return {name: bound for (name, bound), times in found.items() if 2 * times > len(measured)}


def is_duration_of_a_step(seconds: float) -> bool:
    """Whether a clock can have said so."""
    return _LEAST_S <= seconds <= _MOST_S


def _samples(measured: Sequence[Record]) -> dict[str, list[list[float]]]:
    """The durations behind each metric that is a median of them, repeat by repeat."""
    found: dict[str, list[list[float]]] = {}
    for record in counted(measured, _TIME):
        process = record.process_of(_TIME)
        timed = process.phase("time")
        parts = timed.parts if timed else {}
        steps = process.durations_s or ()
        for metric in _MEDIANS:
            of_part = parts[metric.part].durations_s if metric.part and metric.part in parts else ()
            whole = steps if metric.part == "step" else of_part if len(of_part) == len(steps) else ()
            seconds = _of_counted_steps(process, whole)
            value = record.metrics.get(metric.field)
            if value is not None and seconds and all(map(is_duration_of_a_step, seconds)):
                middle = statistics.median(seconds)
                is_rate = metric.role == "rate"
                of_repeat = [value * middle / each for each in seconds] if is_rate else list(seconds)
                found.setdefault(metric.field, []).append(of_repeat)
    return found


def _of_counted_steps(process: ProcessReading, of_steps: Sequence[float]) -> list[float]:
    """The values of the steps that figures are derived from; empty if there are none of each step."""
    numbers = counted_steps(process.durations_s or (), process.waited_s, process.passive)
    return [of_steps[number] for number in numbers] if len(of_steps) == len(process.durations_s or ()) else []


def _waited_s(measured: Sequence[Record]) -> list[list[float]]:
    processes = [record.process_of(_TIME) for record in counted(measured, _TIME)]
    found = [_of_counted_steps(process, process.waited_s or ()) for process in processes]
    return found if all(found) else []


def _stands_for(case: Mapping[str, Any]) -> dict[str, Any]:
    """As a file would have it, where there are no tuples."""
    named = {"model": "model_plugin", "technique": "technique_plugins", "workload": "workload_plugin"}
    found: dict[str, Any] = json.loads(json.dumps({name: case[key] for name, key in named.items() if key in case}))
    return found


def _phases(process: ProcessReading) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for phase in process.phases:
        peak, held = phase.live_peak_bytes, phase.live_held_bytes
        # A user's program may have phases of these names; live memory is not known of it.
        if phase.name in _TOLD_BY_PHASE and peak is not None and held is not None:
            found[phase.name] = {"peak_live_bytes": peak, "held_live_bytes": held}
    return found
