"""The progress of a run: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from membench.errors import one_line
from membench.host.console import without_commands
from membench.units import format_bytes, format_seconds

_REFRESH_S = 0.5
_PLAIN_EVERY_S = 10
_BAR_WIDTH = 20


class Display:
    """Shows a run's events. It draws only while it handles one: a drawing thread would disturb measurements."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, auto_refresh=False, transient=True)
        self._began_at = self._drawn_at = self._said_at = time.monotonic()
        self._doing = "starting"
        self._case: str | None = None
        self._case_began_at = 0.0
        self._number, self._of = 0, 0
        self._phase: str | None = None
        self._baseline_bytes: int | None = None
        self._peak_bytes: int | None = None
        self._work: tuple[int, int] | None = None
        self._work_began_at = self._worked_at = 0.0
        self._durations_s: list[float] = []

    def __enter__(self) -> Display:
        if self._is_live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        now = time.monotonic()
        match event:
            case "start":
                self._of, done = details["of"], details.get("done", 0)
                self._number = done + 1
                if done:
                    self._print(f"{done} of {self._of} are measured already")
            case "case":
                self._case, self._case_began_at = details["id"], now
                self._number, self._of = details["number"], details["of"]
                self._phase = self._work = self._baseline_bytes = self._peak_bytes = None
            case "progress":
                if self._work is None:
                    self._work_began_at = self._said_at = now
                self._doing, self._work, self._worked_at = details["what"], (details["done"], details["total"]), now
                if not self._is_live and now - self._said_at > _PLAIN_EVERY_S:
                    self._said_at = now
                    self._print(f"{details['what']} {details['done']}/{details['total']}")
            case "baseline":
                self._baseline_bytes, self._peak_bytes = details["bytes"], 0
            case "phase":
                self._phase, self._work = details["phase"], None
            case "memory":
                if self._baseline_bytes is not None:
                    held_bytes = details["bytes"] - self._baseline_bytes
                    self._peak_bytes = max(self._peak_bytes or 0, held_bytes)
            case "record":
                self._durations_s.append(details["duration_s"])
                end = "over limit" if details.get("over_limit") else details["status"]
                self._print(f"{end:<14} {details['id']}  {format_seconds(details['duration_s'])}")
        # Drawing while steps are timed would take cores from them.
        is_news = event in ("start", "case", "phase", "record")
        if self._is_live and (is_news or (self._phase != "time" and now - self._drawn_at > _REFRESH_S)):
            self._drawn_at = now
            self._live.refresh()

    def _print(self, line: str) -> None:
        shown = without_commands(one_line(line))
        self._console.print(shown, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(one_line(self.line(options.max_width)), no_wrap=True, overflow="crop")

    def line(self, width: int) -> str:
        """Return the live line in at most ``width`` characters.

        Where they are few, the bar is left out first, then the elapsed time, then the middle of the case's name.
        """
        now = time.monotonic()
        name = self._doing if self._work or not self._case else self._case
        facts = []
        if self._work:
            done, total = self._work
            each_s = (self._worked_at - self._work_began_at) / done if done else None
            left_s = max(0.0, each_s * (total - done) - (now - self._worked_at)) if each_s is not None else None
        else:
            done, total = max(0, self._number - 1), self._of
            left_s = self._left_s(now)
            if self._case:
                facts.append(self._phase or "starting")
            if self._peak_bytes is not None:
                # For a case on a GPU this is the smaller part: memory of the host.
                of_host = " of host" if self._case and "/cuda" in self._case else ""
                facts.append(format_bytes(self._peak_bytes) + of_host)
        if total:
            facts.append(f"{done}/{total}")
        facts.append(f"left {_clock(left_s) if left_s is not None else '?'}")
        gone = _clock(now - self._began_at)
        share = done / total if total else 0.0
        bar = "━" * round(share * _BAR_WIDTH) + "─" * (_BAR_WIDTH - round(share * _BAR_WIDTH))
        for optional in ([gone, bar], [gone], []):
            shown = " · ".join([name, *facts, *optional])
            if len(shown) <= width:
                return shown
        room = width - len(" · ".join(["", *facts]))
        return " · ".join([_shortened(name, max(room, 1)), *facts])

    def _left_s(self, now: float) -> float | None:
        """Estimate the remaining time from the finished cases; ``None`` before the first."""
        if not self._durations_s:
            return None
        typical_s = statistics.fmean(self._durations_s)
        this_s = max(0.0, typical_s - (now - self._case_began_at))
        return this_s + typical_s * (self._of - self._number)


def _shortened(name: str, width: int) -> str:
    """Leave out the middle of a name that is longer than ``width``."""
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return name[: width - 1 - tail] + "…" + name[len(name) - tail :]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
