"""Derivation of metrics from the readings of a job; shared by all kinds of jobs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from membench.errors import one_line
from membench.protocol.messages import BrokenMessage, Result
from membench.protocol.readings import Baseline, MemoryReading, PhaseReading, ProcessReading
from membench.records.disturbance import counted_steps
from membench.records.highest_peak import HIGHEST, highest_live_peak
from membench.records.record import Status
from membench.running.derived_metrics import DerivedMetrics, resolution_bytes

_WIDE_BRACKET = 0.01
_COUNTED_WITHIN_BYTES = 2**16
"""What the interpreter and the C library take or leave from one step to the next."""
_EMULATED = "in a process that was pinned before: up to a third and 7 MiB from one that never was"
_EMULATED_OFF, _EMULATED_OFF_BYTES = 1 / 3, 7 * 2**20
_NOT_PINNED = "the C library's malloc cannot be pinned: only glibc's can"
_GLIBC = ("pinned", "default")


@dataclass(frozen=True)
class JobReadings:
    """The readings of a job, from which its metrics are derived.

    Attributes:
        on_gpu: whether its ranks ran on CUDA devices.
        interval_s: seconds between two samples of the observer.
        processes: the reading of each rank.
        results: the result of each rank; ``None`` for a rank that did not reach its end.
    """

    status: Status
    on_gpu: bool
    interval_s: float
    processes: Sequence[ProcessReading]
    results: Sequence[Result | None]

    @property
    def ranks(self) -> Iterator[tuple[ProcessReading, Result | None]]:
        """The reading and the result of each rank."""
        return zip(self.processes, self.results, strict=True)


@dataclass(frozen=True)
class WorkerMemory:
    """The context for interpreting a worker's memory readings.

    Attributes:
        unpinned: why resident memory is not live memory, if its allocator does not return freed memory at once.
    """

    on_gpu: bool
    unpinned: str | None
    baseline: Baseline

    @classmethod
    def of(cls, process: ProcessReading, result: Result | None, *, on_gpu: bool) -> WorkerMemory:
        """Return the context of a worker's readings; ``result`` is ``None`` if it did not reach its end."""
        others = (phase.allocator for phase in process.phases if phase.allocator not in _GLIBC)
        unpinned = _NOT_PINNED if result is not None and not result.pinned else None
        if (other := next(others, None)) is not None:
            unpinned = f"live is not available under {one_line(other)}"
        return cls(on_gpu, unpinned, process.baseline or Baseline())

    @property
    def clock(self) -> str:
        """Return the source of durations of phases in which memory is measured."""
        return "monotonic clock" if self.unpinned else "monotonic clock, under the pinned allocator"


def phase_of(process: ProcessReading, name: str) -> PhaseReading:
    """Return a phase of a worker that reached its end.

    Raises:
        BrokenMessage: if the worker did not report the phase.
    """
    found = process.phase(name)
    if found is None:
        raise BrokenMessage(f"a worker ended without reporting the phase '{name}'")
    return found


_N = TypeVar("_N", int, float)


def require(value: _N | None) -> _N:
    """Return a value that a worker must report before its end.

    Raises:
        BrokenMessage: if the value is missing.
    """
    if value is None:
        raise BrokenMessage("a worker ended without reporting all its readings")
    return value


def live(found: DerivedMetrics, reading: MemoryReading, name: str, memory: WorkerMemory) -> None:
    """Add the live peak of a phase or of a part of a step."""
    if memory.on_gpu:
        found.add(name, require(reading.cuda_peak_allocated_bytes), "torch.cuda.max_memory_allocated")
        return
    if memory.unpinned:
        found.add_unknown(name, memory.unpinned)
        return
    peak_bytes = require(reading.peak_live_bytes)
    together = reading.family_anonymous_bytes if isinstance(reading, PhaseReading) else None
    if together is not None and isinstance(reading, PhaseReading):
        together -= reading.free_bytes or 0
    how = _with_children(reading, peak_bytes, together, memory.baseline.anonymous_bytes)
    at_least = max(
        0, (reading.peak_live_at_least_bytes or 0) - _passing_file_pages(reading, memory.baseline.file_bytes)
    )
    at_most = max(peak_bytes, reading.peak_live_at_most_bytes or 0)
    wide_bytes = max(_WIDE_BRACKET * peak_bytes, resolution_bytes())
    if not how["children"]:
        if at_most - peak_bytes > wide_bytes:
            how |= {"bound": "about", "at_least_bytes": at_least, "at_most_bytes": at_most}
        elif peak_bytes - at_least > wide_bytes:
            how |= {"bound": "at most", "at_least_bytes": at_least}
    found.add(name, source="kernel's peak (VmHWM) less file pages and free memory, under the pinned allocator",
              resolution_bytes=resolution_bytes(), **how)  # fmt: skip


def _with_children(reading: MemoryReading, own_bytes: int, seen: int | None, baseline_bytes: int) -> dict[str, Any]:
    """Return a peak that includes child processes, with its label.

    The worker's own peak is exact. The sum with its children is only sampled, and the maximum of the two is a lower
    bound of the true peak of the sum.
    """
    if seen is None or not isinstance(reading, PhaseReading):
        return {"value": own_bytes, "bound": "exact", "children": False}
    at_most_bytes = own_bytes + (reading.children_peak_bytes or 0)
    value = min(max(own_bytes, seen - baseline_bytes), at_most_bytes)
    return {"value": value, "bound": "at least", "children": True, "at_most_bytes": at_most_bytes}


def _passing_file_pages(reading: MemoryReading, baseline_bytes: int) -> int:
    """Return the sampled file pages in excess of those at the two ends of a phase."""
    seen = reading.file_peak_bytes if isinstance(reading, PhaseReading) else None
    looked_at = reading.file_most_bytes
    return 0 if seen is None or looked_at is None else max(0, seen - baseline_bytes - looked_at)


def step_memory(found: DerivedMetrics, run: PhaseReading, memory: WorkerMemory) -> None:
    """Add the live memory of a step: its peak, the live memory held after it, and the ratio of the two."""
    live(found, run, "peak_live_bytes", memory)
    _held(found, run, memory)
    _peak_over_held(found)


def _held(found: DerivedMetrics, run: PhaseReading, memory: WorkerMemory) -> None:
    if memory.on_gpu:
        found.add("held_live_bytes", require(run.cuda_held_allocated_bytes), "torch.cuda.memory_allocated")
    elif memory.unpinned:
        found.add_unknown("held_live_bytes", memory.unpinned)
    else:
        found.add("held_live_bytes", require(run.held_live_bytes),
                  "anonymous pages counted one by one, less free memory, after collecting and trimming",
                  resolution_bytes=_COUNTED_WITHIN_BYTES, children=False)  # fmt: skip


def _peak_over_held(found: DerivedMetrics) -> None:
    """Add the ratio of the live peak of a step to the live memory held after it."""
    name = "peak_over_held_ratio"
    for part in ("peak_live_bytes", "held_live_bytes"):
        if found.metrics[part] is None:
            found.add_unknown(name, found.reasons[part])
            return
    peak_bytes, held_bytes = found.metrics["peak_live_bytes"] or 0, found.metrics["held_live_bytes"] or 0
    how = found.obtained["peak_live_bytes"]
    if how.get("children"):
        found.add_unknown(name, "children are in the peak, and what they hold after a step is not known")
    elif held_bytes <= found.obtained["held_live_bytes"].get("resolution_bytes", 0):
        found.add_unknown(name, "what is held after a step is nothing, or too little to be told from nothing")
    else:
        found.add(name, peak_bytes / held_bytes, "live peak over live held", how["bound"])


def warmup(found: DerivedMetrics, phase: PhaseReading, memory: WorkerMemory) -> None:
    """Add the live peak and the duration of the first step."""
    live(found, phase, "warmup_peak_live_bytes", memory)
    found.add("warmup_s", phase.duration_s, memory.clock)


def highest_peak(found: DerivedMetrics) -> None:
    """Add the highest of the live peaks of phases, once they are known."""
    peak = highest_live_peak(found.metrics, found.obtained)
    if peak is not None:
        found.add(HIGHEST, peak.value, **peak.obtained())


def footprint(
    found: DerivedMetrics, run: PhaseReading, time: PhaseReading, memory: WorkerMemory, interval_s: float
) -> None:
    """Add the footprint during the timed steps."""
    if memory.on_gpu:
        _gpu_footprint(found, run, time, interval_s)
        return
    baseline_bytes = memory.baseline.resident_bytes
    how = _with_children(time, require(time.peak_footprint_bytes), time.family_rss_bytes, baseline_bytes)
    under = "the default allocator" if time.allocator in _GLIBC else one_line(time.allocator)
    if how["bound"] == "exact" and time.allocator == "default":
        # mallopt and the steps before leave the heap in another state than a user's process has: for llama-15m that was
        # -27 to +35%. Processes that were never pinned differ as much from each other, by up to 32%.
        how["bound"], under = "about", f"{under}, {_EMULATED}"
        how["off_bytes"] = int(_EMULATED_OFF * how["value"]) + _EMULATED_OFF_BYTES
    found.add("peak_footprint_bytes", source=f"kernel's peak (VmHWM), under {under}",
              resolution_bytes=resolution_bytes(), **how)  # fmt: skip
    found.add("held_footprint_bytes", require(time.held_footprint_bytes),
              f"RSS after collecting and trimming, under {under}", how["bound"] if how["bound"] == "about" else "exact",
              resolution_bytes=resolution_bytes(), children=False)  # fmt: skip


def _gpu_footprint(found: DerivedMetrics, run: PhaseReading, time: PhaseReading, interval_s: float) -> None:
    """Add the footprint on a GPU: by process if NVML's value is plausible, else by device above its idle level."""
    found.add("peak_reserved_bytes", require(time.cuda_peak_reserved_bytes), "torch.cuda.max_memory_reserved")
    process, used = time.gpu_process_peak_bytes, time.gpu_used_peak_bytes
    peak: int | None
    held: int | None
    end: int | None
    # Inside a container, NVML may list another process under our id. A value below torch's reserved memory is wrong.
    if process is not None and time.gpu_process_end_bytes is not None and (
        time.gpu_process_end_bytes >= (time.cuda_held_reserved_bytes or 0)
    ):  # fmt: skip
        source, peak, held, end = (
            "NVML per process, sampled", process, time.gpu_process_end_bytes, run.gpu_process_end_bytes
        )  # fmt: skip
    elif used is not None:
        source = "NVML: used memory of the device above its idle level, sampled; the driver hides the process"
        peak, held, end = used, time.gpu_used_end_bytes, run.gpu_used_end_bytes
    else:
        source, peak, held, end = "", None, None, None
    neither = "NVML shows neither the process nor the device"
    unseen = "NVML did not show the process at the end of phase {}"
    overhead = None if end is None else end - (run.cuda_held_reserved_bytes or 0)
    known: tuple[tuple[str, int | None, dict[str, Any], str], ...] = (
        ("peak_footprint_bytes", peak, {"source": source, "bound": "at least", "interval_s": interval_s}, neither),
        ("held_footprint_bytes", held, {"source": source.replace(", sampled", "")}, unseen.format("time")),
        ("context_overhead_bytes", overhead, {"source": f"{source}, less torch's reserved"}, unseen.format("run")),
    )
    for name, value, how, otherwise in known:
        if value is None:
            found.add_unknown(name, time.gpu_unknown or (neither if peak is None else otherwise))
        else:
            found.add(name, value, **how)
    if time.gpu_energy_j is None:
        found.add_unknown("energy_j", time.gpu_unknown or "the device has no energy counter")
    else:
        energy_j = time.gpu_energy_j / (time.steps or 1)
        found.add("energy_j", energy_j, "NVML's counter over the phase time, whole device")


def children(found: DerivedMetrics, phases: Sequence[PhaseReading], interval_s: float) -> None:
    """Add the peak memory of child processes over all phases."""
    held = [phase.children_peak_bytes for phase in phases if phase.children_peak_bytes]
    if held:
        found.add("children_peak_bytes", max(held), "pages of children alone (USS), sampled", "at least",
                  interval_s=interval_s)  # fmt: skip


def times(found: DerivedMetrics, result: Result, time: PhaseReading, *, on_gpu: bool, is_complete: bool = True) -> None:
    """Add durations of steps and of their parts, and the throughput.

    Args:
        is_complete: whether the worker reported all; if it failed at its end, a number of tokens may be missing.
    """
    source = "monotonic clock, " + ("after a synchronize" if on_gpu else "under the default allocator")
    if result.wait_policy:
        source += f"; {result.wait_policy}"
    steps = len(result.durations_s)
    counted = counted_steps(result.durations_s, result.waited_s, result.passive)
    durations = [result.durations_s[number] for number in counted]
    median = statistics.median(durations)
    found.add("step_median_s", median, source)
    if result.tokens_per_step is not None:
        found.add("tokens_per_s", result.tokens_per_step / median, source)
    if result.epoch_bytes:
        found.add("read_mb_per_s", result.epoch_bytes / 1e6 / median, source)
    if len(durations) < 2:
        reason = "one step has no spread: settings.measured_steps is 1"
        if steps > 1:
            reason = "one step has no spread: other processes disturbed the others"
        for name in ("step_p95_s", "step_spread_percent"):
            found.add_unknown(name, reason)
    else:
        found.add("step_p95_s", statistics.quantiles(durations, n=20, method="inclusive")[-1], source)
        low, _, high = statistics.quantiles(durations, n=4, method="inclusive")
        found.add("step_spread_percent", (high - low) / median * 100, source)
    parts = {
        name: statistics.median(_of_steps(_by_step(part.durations_s, steps), counted))
        for name, part in time.parts.items()
        if part.durations_s
    }
    if "prefill" in parts:
        found.add("time_to_first_token_s", parts["prefill"], source)
    if "decode" in parts and result.decoded_tokens is None and not is_complete:
        found.add_unknown("decode_tokens_per_s", "the workload reports no valid number of tokens")
    elif "decode" in parts:
        found.add("decode_tokens_per_s", require(result.decoded_tokens) / parts["decode"], source)
    for part in ("forward", "backward", "optimizer"):
        if part in parts:
            found.add(f"{part}_s", parts[part], source)


def _of_steps(by_step: Sequence[float], counted: Sequence[int]) -> Sequence[float]:
    """Return the durations of a part in the counted steps; all of them if the part did not run in each step."""
    return [by_step[number] for number in counted] if counted and counted[-1] < len(by_step) else by_step


def _by_step(durations_s: Sequence[float], steps: int) -> list[float]:
    """Return the seconds that a part took in each step; with micro-batches, a part runs several times per step."""
    times = max(1, len(durations_s) // steps)
    return [sum(durations_s[first : first + times]) for first in range(0, len(durations_s), times)]
