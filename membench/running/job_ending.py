"""How a process of a job, or the whole job, ended: status and message where it did not report them."""

from __future__ import annotations

import os
import signal

from membench.host import last_words, procfs
from membench.records.record import Status
from membench.running import where_it_hung
from membench.running.fork_client import ForkServerLost, ForkServerSilent
from membench.running.rank import Rank


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names of their own
        return f"signal {number}"


def kernel_killed_for_memory(oom_kills_before: int | None) -> bool:
    """Whether the kernel has killed a process for lack of memory since the counter was read."""
    now = procfs.oom_kills()
    return None not in (oom_kills_before, now) and now != oom_kills_before


def settle_status(rank: Rank, exited: int, timed_out: bool, timeout_s: float, oom_kills_before: int | None) -> None:
    """Set the status of a rank that did not report one, or that reported only that another process failed.

    Args:
        exited: its exit status as returned by ``os.waitpid``.
        timed_out: whether it was killed because it exceeded its time limit.
    """
    if rank.status is not None:
        if rank.status == "failed" and rank.message and last_words.are_of_another(rank.message):
            _settle_for_another(rank, rank.message, oom_kills_before)
        return
    words = last_words.of(rank.said)
    if rank.is_done:
        rank.status, rank.phase = "ok", None
        return
    if timed_out:
        rank.status, rank.message = "timeout", f"not done after {timeout_s:g} s"
        if rank.says_where_it_is and (stack := where_it_hung.frames(rank.said)):
            rank.message += f"; it was {stack[0]}"
        return
    if os.WIFSIGNALED(exited):
        number = os.WTERMSIG(exited)
        if number == signal.SIGKILL and kernel_killed_for_memory(oom_kills_before):
            rank.status, rank.message = "out-of-memory", "killed by the kernel for lack of memory"
            return
        rank.status, rank.message = "crashed", f"killed by {_signal_name(number)}"
    else:
        rank.status = "crashed"
        rank.message = f"ended with exit code {os.WEXITSTATUS(exited)} before it was done"
    if words.are_of_memory:
        rank.status = "out-of-memory"
        if not rank.last_line():
            rank.message += f": {words.line}"


def _settle_for_another(rank: Rank, message: str, oom_kills_before: int | None) -> None:
    """Look for the reason of a process that a rank had started and that failed."""
    words = last_words.of(rank.said)
    if words.are_of_memory:
        rank.status, rank.message = "out-of-memory", f"{message} (after: {words.line})"
    elif kernel_killed_for_memory(oom_kills_before) and last_words.tell_of_a_kill(f"{message}\n{rank.said}"):
        rank.status = "out-of-memory"
        rank.message = f"{message} (after the kernel had killed a process for lack of memory)"


def ending_of_lost(
    error: ForkServerLost, timed_out: bool, timeout_s: float, oom_kills_before: int | None
) -> tuple[Status, str]:
    """Return status and message of a job whose fork server was lost."""
    if isinstance(error, ForkServerSilent):
        return "timeout", f"not done after {timeout_s:g} s; {error}" if timed_out else str(error)
    return "out-of-memory" if kernel_killed_for_memory(oom_kills_before) else "crashed", str(error)
