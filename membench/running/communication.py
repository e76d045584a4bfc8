"""Metrics of what the ranks of a case say to each other, from the readings of one of them."""

from __future__ import annotations

from membench.protocol.messages import Result
from membench.records.waiting_share import wait_percent
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
    percent = wait_percent(result.durations_s, result.slept_s, result.waited_s, result.passive)
    if percent is None:
        found.add_unknown(_WAIT, _ON_GPU if on_gpu else _NO_CLOCK)
        return
    source = "time in which the thread of the timed steps slept (schedstat); ranks share this machine's cores"
    found.add(_WAIT, percent, source, "at most")
