"""Metrics of what the ranks of a case say to each other, from the readings of one of them."""

from __future__ import annotations

from membench.protocol.messages import Result
from membench.records.disturbance import counted_steps
from membench.running.derived_metrics import DerivedMetrics

_BYTES, _WAIT = "communicated_bytes", "communication_wait_percent"
_NOT_COUNTED = "the step in which collectives are counted did not end"
_ON_GPU = "collectives wait on the GPU, where the time of a thread does not show it"
_NO_CLOCK = "the kernel does not report for how long a thread slept"


def add(found: DerivedMetrics, result: Result, *, on_gpu: bool) -> None:
    """Add the bytes that a rank hands to collectives in a step, and the share of its timed steps that it waits."""
    if result.communicated_bytes is None:
        found.add_unknown(_BYTES, _NOT_COUNTED)
    else:
        total = sum(result.communicated_bytes.values())
        found.add(_BYTES, total, "sizes of the tensors of c10d's operations, in a step of its own")
    if result.slept_s is None or len(result.slept_s) != len(result.durations_s):
        found.add_unknown(_WAIT, _ON_GPU if on_gpu else _NO_CLOCK)
        return
    steps = counted_steps(result.durations_s, result.waited_s, result.passive)
    slept_s, all_s = (sum(each[step] for step in steps) for each in (result.slept_s, result.durations_s))
    source = "time in which the thread of the timed steps slept (schedstat); ranks share this machine's cores"
    found.add(_WAIT, min(1.0, slept_s / all_s) * 100, source, "at most")
