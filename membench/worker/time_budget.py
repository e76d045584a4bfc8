"""A time within which as many like pieces of work are done as it allows."""

from __future__ import annotations

import time


class TimeBudget:
    """Decides after each piece whether there is time for more.

    It is asked to stop after one, two, four, eight … pieces only, and foresees the time of as many again: so the number
    of pieces that are done depends little on how fast the machine happens to be.
    """

    def __init__(self, seconds: float | None) -> None:
        """Begin; ``None`` allows any time."""
        self._seconds, self._began_s = seconds, time.monotonic()
        self._at_half_s = 0.0

    def is_used_up(self, done: int, left: int) -> bool:
        """Whether to stop after ``done`` pieces, with ``left`` more to do.

        After the first it is only whether that alone took too long: it may hold what is done once, such as compiling.
        """
        if self._seconds is None or done & (done - 1):
            return False
        gone_s = time.monotonic() - self._began_s
        of_last_half_s = gone_s - self._at_half_s
        self._at_half_s = gone_s
        if done == 1:
            return gone_s > self._seconds
        each_s = of_last_half_s / (done // 2)
        return gone_s + min(done, left) * each_s > self._seconds
