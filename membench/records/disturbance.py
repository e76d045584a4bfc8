"""Which timed steps were disturbed: they say how busy the machine was, and nothing of what was measured.

This is the one definition. The worker takes such steps again, and every reader marks what was derived from them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from membench.protocol.readings import ProcessReading

MOST_WAITING = 0.1
"""The largest share of a duration that threads may have waited for cores which other processes used. On a quiet machine
it is below 0.03."""

_ENOUGH = 3
"""So many calm steps give a median, however many were disturbed."""


def has_waited(duration_s: float, waited_s: float | None) -> bool:
    """Whether threads waited so long for cores that a duration says little; not if the waiting is unknown."""
    return waited_s is not None and waited_s > MOST_WAITING * duration_s


def calm_steps(
    durations_s: Sequence[float], waited_s: Sequence[float] | None, passive: Sequence[bool] | None
) -> list[int]:
    """Return the numbers of the timed steps that were not disturbed, from 0.

    Args:
        waited_s: for how long the threads of each step waited for cores that other processes used; ``None``: not known.
        passive: whether threads waited for each other passively in a step because other processes used the cores, which
            they do not in a user's process; ``None``: not in any.
    """
    waiting = waited_s if waited_s and len(waited_s) == len(durations_s) else [None] * len(durations_s)
    asleep = passive if passive and len(passive) == len(durations_s) else [False] * len(durations_s)
    return [
        number
        for number, (duration_s, each_s, is_passive) in enumerate(zip(durations_s, waiting, asleep, strict=True))
        if not is_passive and not has_waited(duration_s, each_s)
    ]


def counted_steps(
    durations_s: Sequence[float], waited_s: Sequence[float] | None, passive: Sequence[bool] | None
) -> list[int]:
    """Return the numbers of the steps that figures are derived from: the calm ones, or all if they are too few."""
    calm = calm_steps(durations_s, waited_s, passive)
    return calm if are_enough(calm, durations_s) else list(range(len(durations_s)))


def counted_durations_s(process: ProcessReading) -> list[float]:
    """Return the durations of the timed steps that figures are derived from."""
    durations_s = process.durations_s or ()
    return [durations_s[number] for number in counted_steps(durations_s, process.waited_s, process.passive)]


def are_enough(calm: Sequence[int], durations_s: Sequence[float]) -> bool:
    """Whether there are calm steps enough to derive figures from: half of all steps, or a few."""
    return len(calm) >= min(_ENOUGH, len(durations_s) / 2)


def steps_are_disturbed(process: ProcessReading) -> bool:
    """Whether a process has too few calm steps, so that its times are marked and support no conclusion."""
    durations_s = process.durations_s or ()
    return not are_enough(calm_steps(durations_s, process.waited_s, process.passive), durations_s)
