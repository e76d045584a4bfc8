"""A case's metrics out of its phases: each with how it was obtained, or the reason why it is not known."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_WIDE_BRACKET = 0.01
_PAGES_IN_A_BATCH = 32


def resolution_bytes() -> int:
    """How far off the kernel's peak may be: each core counts up to a batch of pages by itself before it adds them."""
    cores = os.cpu_count() or 1
    return max(_PAGES_IN_A_BATCH, 2 * cores) * cores * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Figures:
    """What ``Record`` keeps as ``metrics``, ``reasons`` and ``obtained``; all by metric field."""

    metrics: dict[str, float | int | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    obtained: dict[str, dict[str, Any]] = field(default_factory=dict)

    def know(self, name: str, value: float | int, source: str, bound: str = "exact", **how: Any) -> None:
        self.metrics[name] = value
        self.obtained[name] = {"source": source, "bound": bound, **how}

    def miss(self, name: str, reason: str) -> None:
        self.metrics[name] = None
        self.reasons[name] = reason


def figures(
    phases: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    status: str,
    on_gpu: bool,
    interval_s: float,
    baseline: Mapping[str, int] | None,
) -> Figures:
    """Work out every metric that has a meaning for the case.

    Args:
        phases: as the worker measured and the observer completed them.
        result: what the worker said at its end; empty if it did not get there.
        status: how the case ended.
        on_gpu: whether the case ran on CUDA.
        interval_s: between the observer's samples.
        baseline: resident bytes of the worker before the case, if it got so far.
    """
    found = Figures()
    baseline = baseline or {"anonymous_bytes": 0, "file_bytes": 0}
    by_name = {phase["name"]: phase for phase in phases}
    if not result:
        for name in ("weights_bytes", "peak_live_bytes", "held_live_bytes", "peak_footprint_bytes",
                     "held_footprint_bytes", "disk_bytes", "step_median_s", "tokens_per_s"):  # fmt: skip
            found.miss(name, f"the case ended as {status}")
        for name in ("load", "apply"):
            if name in by_name:
                _live(found, by_name[name], f"{name}_peak_live_bytes", on_gpu, True, baseline)
        return found
    found.know("weights_bytes", result["weights_bytes"], "walk over parameters and buffers")
    pinned = result["pinned"]
    _live(found, by_name["run"], "peak_live_bytes", on_gpu, pinned, baseline)
    _held(found, by_name["run"], on_gpu, pinned)
    _live(found, by_name["load"], "load_peak_live_bytes", on_gpu, pinned, baseline)
    _live(found, by_name["apply"], "apply_peak_live_bytes", on_gpu, pinned, baseline)
    found.know("apply_s", by_name["apply"]["duration_s"], "monotonic clock, under the pinned allocator")
    if on_gpu:
        _gpu_footprint(found, by_name, interval_s)
    else:
        _cpu_footprint(found, by_name["time"], baseline)
    _children(found, phases, interval_s)
    for name, (value, fact_source) in result.get("facts", {}).items():
        found.know(name, value, fact_source)
    if "store" in by_name:
        _live(found, by_name["store"], "store_peak_live_bytes", on_gpu, pinned, baseline)
        found.know("store_s", by_name["store"]["duration_s"], "monotonic clock, under the pinned allocator")
        if (compressing := by_name["store"]["parts"].get("compress")) is not None:
            _live(found, compressing, "compress_peak_live_bytes", False, pinned, baseline)
    if result["disk_bytes"] is None:
        found.miss("disk_bytes", result["disk_format"])
    else:
        found.know("disk_bytes", result["disk_bytes"], f"size of the file written by {result['disk_format']}")
    _times(found, result, by_name["time"], on_gpu)
    for part in ("prefill", "decode", "forward", "backward", "optimizer"):
        if part in by_name["run"]["parts"]:
            _live(found, by_name["run"]["parts"][part], f"{part}_peak_live_bytes", on_gpu, pinned, baseline)
    _warmup(found, by_name["warmup"], on_gpu, pinned, baseline)
    breakdown = result.get("breakdown_bytes", {})
    for category, name in _CATEGORIES.items():
        sizes = [of_part[category] for of_part in breakdown.values() if category in of_part]
        if sizes:
            found.know(name, max(sizes), "walk over storages at the highest moment of a part of a step")
    for name, source in (
        ("trained_weights_bytes", "walk over parameters"),
        ("frozen_weights_bytes", "walk over parameters and buffers, less those trained"),
    ):
        if name in result:
            found.know(name, result[name], source)
    if result["losses_nats"]:
        if result["losses_nats"][-1] is None:
            found.miss("final_loss_nats", "it is not finite")
        else:
            found.know("final_loss_nats", result["losses_nats"][-1], "cross entropy in fp32 of the last step")
    if "quality" in result:
        _quality(found, result["quality"], result["is_trained"])
    for name, told in result.get("own_metrics", {}).items():
        if told["value"] is None:
            found.miss(name, told["reason"])
        else:
            found.know(name, told["value"], "a plug-in's own measuring over held-out text")
    return found


def figures_of_calls(
    phases: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    status: str,
    on_gpu: bool,
    interval_s: float,
    baseline: Mapping[str, int] | None,
) -> Figures:
    """The same for calls of a function: what there is without a model and its quality."""
    found = Figures()
    baseline = baseline or {"anonymous_bytes": 0, "file_bytes": 0}
    if not result:
        for name in ("peak_live_bytes", "held_live_bytes", "peak_footprint_bytes", "held_footprint_bytes",
                     "step_median_s"):  # fmt: skip
            found.miss(name, f"the case ended as {status}")
        return found
    by_name, pinned = {phase["name"]: phase for phase in phases}, result["pinned"]
    _live(found, by_name["run"], "peak_live_bytes", on_gpu, pinned, baseline)
    _held(found, by_name["run"], on_gpu, pinned)
    _warmup(found, by_name["warmup"], on_gpu, pinned, baseline)
    if on_gpu:
        _gpu_footprint(found, by_name, interval_s)
    else:
        _cpu_footprint(found, by_name["time"], baseline)
    _children(found, phases, interval_s)
    _times(found, result, by_name["time"], on_gpu)
    return found


NO_LIVE = "a script keeps its own allocator: what it freed and still holds cannot be told from what it uses"


def figures_of_program(
    phases: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    status: str,
    on_gpu: bool,
    interval_s: float,
    baseline: Mapping[str, int] | None,
) -> Figures:
    """The same for a user's program as it is: whole, its interpreter included; to where it ended, however it did."""
    del baseline  # nothing is taken off
    found = Figures()
    found.miss("peak_live_bytes", NO_LIVE)
    if not phases:
        for name in ("peak_footprint_bytes", "step_median_s"):
            found.miss(name, f"the case ended as {status}")
        return found
    whole = phases[0]
    if on_gpu:
        _gpu_footprint_of_program(found, whole, interval_s)
    else:
        _footprint_of_program(found, whole, result, interval_s)
    _children(found, phases, interval_s)
    if status == "ok":
        found.know("step_median_s", result["durations_s"][0], "monotonic clock, from the script's start to its end")
    else:
        found.miss("step_median_s", f"the case ended as {status}")
    return found


def _footprint_of_program(
    found: Figures, whole: Mapping[str, Any], result: Mapping[str, Any], interval_s: float
) -> None:
    how: dict[str, Any] = {"source": "kernel's peak (VmHWM, ru_maxrss), under the script's own allocator",
                           "bound": whole.get("bound", "exact"), "resolution_bytes": resolution_bytes(),
                           "children": False}  # fmt: skip
    if how["bound"] == "at most" and result["had_children"]:
        found.miss("peak_footprint_bytes", "script and children take less than what they were forked from")
        return
    if how["bound"] == "at least" or result["had_children"]:
        # The kernel tells the highest peak of any child that was waited for, too, however short it lived.
        how |= {"source": "kernel's peak (VmHWM, ru_maxrss); with children, their own pages (USS), sampled",
                "bound": "at least", "children": True, "interval_s": interval_s}  # fmt: skip
    found.know("peak_footprint_bytes", whole["peak_footprint_bytes"], **how)


def _gpu_footprint_of_program(found: Figures, whole: Mapping[str, Any], interval_s: float) -> None:
    """NVML's figure of the processes, or of the device above its idle level where the driver hides them."""
    peak_bytes, used_bytes = whole["gpu_process_peak_bytes"], whole["gpu_used_peak_bytes"]
    source = "NVML per process, sampled"
    # A container has process ids of its own: what NVML shows under ours may be another's, and more than ours took.
    if peak_bytes is None or (used_bytes is not None and peak_bytes > used_bytes):
        peak_bytes = used_bytes
        source = "NVML: used memory of the device above its idle level, sampled; the driver hides the process"
    if peak_bytes is None:
        found.miss("peak_footprint_bytes", whole.get("gpu_unknown") or "NVML shows neither the process nor the device")
    else:
        found.know("peak_footprint_bytes", peak_bytes, source, "at least", interval_s=interval_s)
    if whole["gpu_energy_j"] is not None:
        found.know("energy_j", whole["gpu_energy_j"], "NVML's counter from the script's start to its end, whole device")


_CATEGORIES = {
    "optimizer": "optimizer_state_bytes",
    "cache": "cache_bytes",
    "activations": "activations_bytes",
}


def _quality(found: Figures, quality: Mapping[str, Any], is_trained: bool) -> None:
    """Quality from each piece's loss; a difference to the reference from the pieces' own differences."""
    source = "cross entropy in fp32 over held-out text"
    nats, all_bytes = quality["nats"], sum(quality["bytes"]) if None not in quality["bytes"] else None
    if is_trained:
        if None in nats or all_bytes is None:
            reason = "it is not finite" if None in nats else "the model has no tokenizer: no text can be put to it"
            for name in ("bits_per_byte", "perplexity_per_token"):
                found.miss(name, reason)
        else:
            found.know("bits_per_byte", sum(nats) / all_bytes / math.log(2), source)
            found.know("perplexity_per_token", _exponential(sum(nats) / sum(quality["tokens"])), source)
    against = f"{source}, against the reference's logits"
    for name in ("kl_nats", "top1_agreement_percent"):
        if name in quality:
            if quality[name] is None:
                found.miss(name, quality.get("unknown", "the logits are not finite"))
            else:
                found.know(name, quality[name], against)
    if is_trained and all_bytes and "reference_nats" in quality and None not in (*nats, *quality["reference_nats"]):
        differences = [own - theirs for own, theirs in zip(nats, quality["reference_nats"], strict=True)]
        in_bits = 1 / all_bytes / math.log(2)
        found.know("lost_bits_per_byte", sum(differences) * in_bits, against)
        if len(differences) > 1:
            error = statistics.stdev(differences) * len(differences) ** 0.5 * in_bits
            found.know("lost_bits_per_byte_standard_error", error, f"{len(differences)} paired pieces of text")


def _exponential(exponent: float) -> float:
    """``exp`` that stays a size that figures have: a loss of 460 nats is as bad as any."""
    return math.exp(min(exponent, 460))


def _children(found: Figures, phases: Sequence[Mapping[str, Any]], interval_s: float) -> None:
    held = [phase["children_peak_bytes"] for phase in phases if phase.get("children_peak_bytes")]
    if held:
        found.know("children_peak_bytes", max(held), "pages of children alone (USS), sampled", "at least",
                   interval_s=interval_s)  # fmt: skip


def _warmup(found: Figures, phase: Mapping[str, Any], on_gpu: bool, pinned: bool, baseline: Mapping[str, int]) -> None:
    _live(found, phase, "warmup_peak_live_bytes", on_gpu, pinned, baseline)
    found.know("warmup_s", phase["duration_s"], "monotonic clock, under the pinned allocator")


def _with_children(phase: Mapping[str, Any], own_bytes: int, family: str, baseline_bytes: int) -> dict[str, Any]:
    """A peak with what children held, and how it must be labelled.

    The worker's own peak is exact. With its children it was seen in samples only: the highest of both is a lower bound
    of the highest sum.
    """
    seen = phase.get(family)
    if seen is None:
        return {"value": own_bytes, "bound": "exact", "children": False}
    return {"value": max(own_bytes, seen - baseline_bytes), "bound": "at least", "children": True,
            "at_most_bytes": own_bytes + phase["children_peak_bytes"]}  # fmt: skip


def _live(
    found: Figures, phase: Mapping[str, Any], name: str, on_gpu: bool, pinned: bool, baseline: Mapping[str, int]
) -> None:
    if on_gpu:
        found.know(name, phase["cuda_peak_allocated_bytes"], "torch.cuda.max_memory_allocated")
        return
    if not pinned:
        found.miss(name, "the C library's malloc cannot be pinned: only glibc's can")
        return
    how = _with_children(phase, phase["peak_live_bytes"], "family_anonymous_bytes", baseline["anonymous_bytes"])
    at_least = max(0, phase["peak_live_at_least_bytes"] - _passing_file_pages(phase, baseline["file_bytes"]))
    if not how["children"] and phase["peak_live_bytes"] - at_least > _WIDE_BRACKET * max(phase["peak_live_bytes"], 1):
        how |= {"bound": "at most", "at_least_bytes": at_least}
    found.know(name, source="kernel's peak (VmHWM) less file pages, under the pinned allocator",
               resolution_bytes=resolution_bytes(), **how)  # fmt: skip


def _passing_file_pages(phase: Mapping[str, Any], baseline_bytes: int) -> int:
    """File pages that came and went between the looks of a phase, as far as samples saw them."""
    seen, looked_at = phase.get("file_peak_bytes"), phase.get("file_most_bytes")
    return 0 if seen is None or looked_at is None else max(0, seen - baseline_bytes - looked_at)


def _held(found: Figures, run: Mapping[str, Any], on_gpu: bool, pinned: bool) -> None:
    if on_gpu:
        found.know("held_live_bytes", run["cuda_held_allocated_bytes"], "torch.cuda.memory_allocated")
    elif pinned:
        found.know("held_live_bytes", run["held_live_bytes"], "RssAnon after collecting and trimming",
                   resolution_bytes=resolution_bytes(), children=False)  # fmt: skip
    else:
        found.miss("held_live_bytes", "the C library's malloc cannot be pinned: only glibc's can")


def _cpu_footprint(found: Figures, time: Mapping[str, Any], baseline: Mapping[str, int]) -> None:
    baseline_bytes = baseline["anonymous_bytes"] + baseline["file_bytes"]
    how = _with_children(time, time["peak_footprint_bytes"], "family_rss_bytes", baseline_bytes)
    found.know("peak_footprint_bytes", source="kernel's peak (VmHWM), under the default allocator",
               resolution_bytes=resolution_bytes(), **how)  # fmt: skip
    found.know("held_footprint_bytes", time["held_footprint_bytes"], "RSS after collecting and trimming",
               resolution_bytes=resolution_bytes(), children=False)  # fmt: skip


def _gpu_footprint(found: Figures, by_name: Mapping[str, Mapping[str, Any]], interval_s: float) -> None:
    """NVML's figure of the process where it can be believed, else the device's use above its idle level."""
    time, run = by_name["time"], by_name["run"]
    found.know("peak_reserved_bytes", time["cuda_peak_reserved_bytes"], "torch.cuda.max_memory_reserved")
    process, used = time["gpu_process_peak_bytes"], time["gpu_used_peak_bytes"]
    # A container has process ids of its own: what NVML shows under ours may be another's. Ours cannot hold less than
    # torch reserved.
    if process is not None and time["gpu_process_end_bytes"] is not None and (
        time["gpu_process_end_bytes"] >= time["cuda_held_reserved_bytes"]
    ):  # fmt: skip
        source, peak, held, end = (
            "NVML per process, sampled", process, time["gpu_process_end_bytes"], run["gpu_process_end_bytes"]
        )  # fmt: skip
    elif used is not None:
        source = "NVML: used memory of the device above its idle level, sampled; the driver hides the process"
        peak, held, end = used, time["gpu_used_end_bytes"], run["gpu_used_end_bytes"]
    else:
        source, peak, held, end = "", None, None, None
    neither = "NVML shows neither the process nor the device"
    unseen = "NVML did not show the process at the end of phase {}"
    overhead = None if end is None else end - run["cuda_held_reserved_bytes"]
    for name, value, how, otherwise in (
        ("peak_footprint_bytes", peak, {"source": source, "bound": "at least", "interval_s": interval_s}, neither),
        ("held_footprint_bytes", held, {"source": source.replace(", sampled", "")}, unseen.format("time")),
        ("context_overhead_bytes", overhead, {"source": f"{source}, less torch's reserved"}, unseen.format("run")),
    ):
        if value is None:
            found.miss(name, time.get("gpu_unknown") or (neither if peak is None else otherwise))
        else:
            found.know(name, value, **how)
    if time["gpu_energy_j"] is None:
        found.miss("energy_j", time.get("gpu_unknown") or "the device has no energy counter")
    else:
        found.know("energy_j", time["gpu_energy_j"] / time["steps"], "NVML's counter over the phase time, whole device")


def _times(found: Figures, result: Mapping[str, Any], time: Mapping[str, Any], on_gpu: bool) -> None:
    source = "monotonic clock, " + ("after a synchronize" if on_gpu else "under the default allocator")
    durations = result["durations_s"]
    median = statistics.median(durations)
    found.know("step_median_s", median, source)
    if result["tokens_per_step"] is not None:
        found.know("tokens_per_s", result["tokens_per_step"] / median, source)
    if result.get("epoch_bytes"):
        found.know("read_mb_per_s", result["epoch_bytes"] / 1e6 / median, source)
    if len(durations) < 2:
        for name in ("step_p95_s", "step_spread_percent"):
            found.miss(name, "one step has no spread: settings.measured_steps is 1")
    else:
        found.know("step_p95_s", statistics.quantiles(durations, n=20, method="inclusive")[-1], source)
        low, _, high = statistics.quantiles(durations, n=4, method="inclusive")
        found.know("step_spread_percent", (high - low) / median * 100, source)
    parts = {
        name: statistics.median(_by_step(part["durations_s"], len(durations)))
        for name, part in time["parts"].items()
        if part["durations_s"]
    }
    if "prefill" in parts:
        found.know("time_to_first_token_s", parts["prefill"], source)
    if "decode" in parts:
        found.know("decode_tokens_per_s", result["decoded_tokens"] / parts["decode"], source)
    for part in ("forward", "backward", "optimizer"):
        if part in parts:
            found.know(f"{part}_s", parts[part], source)


def _by_step(durations_s: Sequence[float], steps: int) -> list[float]:
    """How long a part took in each step: a step of several micro-batches goes through its parts several times."""
    times = max(1, len(durations_s) // steps)
    return [sum(durations_s[first : first + times]) for first in range(0, len(durations_s), times)]
