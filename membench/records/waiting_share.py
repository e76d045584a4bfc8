"""The share of the timed steps in which a rank's computing thread slept, as it does where it waits for others."""

from __future__ import annotations

from collections.abc import Sequence

from membench.records.disturbance import counted_steps


def wait_percent(
    durations_s: Sequence[float] | None,
    slept_s: Sequence[float] | None,
    waited_s: Sequence[float] | None,
    passive: Sequence[bool] | None,
) -> float | None:
    """Return an upper bound of the share that a rank waited for others, in percent; ``None`` if it is not known.

    Args:
        slept_s: for how long the thread slept in each step, for whatever reason.
        waited_s, passive: what other processes did to each step; disturbed ones count only if there are no others.
    """
    if not durations_s or slept_s is None or len(slept_s) != len(durations_s):
        return None
    steps = counted_steps(durations_s, waited_s, passive)
    all_s = sum(durations_s[step] for step in steps)
    return min(1.0, sum(slept_s[step] for step in steps) / all_s) * 100 if all_s else None
