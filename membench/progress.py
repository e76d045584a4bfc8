"""What a run shows while it goes on: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from membench.units import format_bytes, format_seconds

_REFRESH_S = 0.5


class Display:
    """Hears a run's events. It draws by itself only when told to, never from a thread beside a measurement."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, auto_refresh=False, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=None)
        self._case, self._phase, self._peak_bytes, self._drawn_at = "", "", 0, 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        match event:
            case "case":
                self._case, self._phase, self._peak_bytes = details["id"], "starting", 0
                self._progress.update(self._task, completed=details["number"] - 1, total=details["of"])
            case "phase":
                self._phase = details["phase"]
            case "memory":
                self._peak_bytes = max(self._peak_bytes, details["bytes"])
            case "progress":
                self._case, self._phase = details["what"], ""
                self._progress.update(self._task, completed=details["done"], total=details["total"])
                if not self._console.is_terminal and details["done"] % 200 == 0:
                    self._console.print(f"{details['what']} {details['done']}/{details['total']}", highlight=False)
            case "record":
                line = f"{details['status']:<14} {details['id']}  {format_seconds(details['duration_s'])}"
                self._console.print(line, highlight=False, soft_wrap=True)
        # Nothing is drawn while steps are timed: it would take their cores.
        if self._console.is_terminal and self._phase != "time" and time.monotonic() - self._drawn_at > _REFRESH_S:
            self._drawn_at = time.monotonic()
            text = f"{self._case} · {self._phase} · {format_bytes(self._peak_bytes)}" if self._phase else self._case
            self._progress.update(self._task, description=text, refresh=True)
