"""Starts the ranks of a job, hears and observes them until all are gone, and settles how they ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Protocol

from membench.host import procfs
from membench.host.nvml import Gpus
from membench.protocol.forking import WorkerEnded
from membench.protocol.messages import (
    ACKNOWLEDGED,
    BrokenMessage,
    MarkEntered,
    MarkLeft,
    Message,
    PhaseBegins,
    PhaseEnds,
    decode,
)
from membench.running.fork_client import ForkServer
from membench.running.jobs.kind import RunnableJob
from membench.running.observer import Observer
from membench.running.rank import Rank, Tell
from membench.running.references import References
from membench.running.timeline import Timeline

_SHARE_OF_LOOKING = 0.1
"""While steps are timed, of one core: a look at children walks their page tables, and takes milliseconds for each."""
_LARGEST_READ_BYTES = 65536


class Turn(Protocol):
    """Says when a job may go on where several runners share a machine. Each method waits until it may."""

    def share(self) -> None:
        """Work beside others, but not beside one that is alone."""

    def alone(self) -> None:
        """Work while no other does."""

    def leave(self) -> None:
        """Work no more."""


class _Ends:
    """This process's ends of what connects it with a rank, and those that the rank gets."""

    def __init__(self) -> None:
        self.pipe, self._their_pipe = socket.socketpair()
        self.output, self._their_output = os.pipe()
        self.unread = b""

    def theirs(self) -> tuple[int, int]:
        return self._their_pipe.fileno(), self._their_output

    def hand_over(self) -> None:
        """Close what the rank has by now: only then does its end show when the rank closes it."""
        if self._their_output >= 0:
            self._their_pipe.close()
            os.close(self._their_output)
            self._their_output = -1

    def close(self) -> None:
        self.hand_over()
        self.pipe.close()
        os.close(self.output)


class Following:
    """A job under way on one or more ranks. Use as a context manager."""

    def __init__(self, job: RunnableJob, turn: Turn | None, tell: Tell) -> None:
        self.ranks: Sequence[Rank] = [job.rank(number, tell) for number in range(job.device.count)]
        self.timeline = Timeline()
        self.waited_s = 0.0
        self.timed_out = False
        self._job, self._turn, self._tell = job, turn, tell
        self._server: ForkServer | None = None
        self._ends: dict[Rank, _Ends] = {}
        self._ended: dict[Rank, WorkerEnded] = {}
        self._arrived: dict[Rank, Message] = {}

    def __enter__(self) -> Following:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._server:
            self._server.kill()
        if self._turn:
            self._turn.leave()
        for rank in self.ranks:
            rank.close()
        for ends in self._ends.values():
            ends.close()

    def start(self, server: ForkServer, gpus: Gpus | None, no_gpus: str | None, references: References) -> None:
        """Start all ranks.

        Raises:
            ForkServerLost: if the fork server is gone.
        """
        self._server = server
        # The idle level of the GPUs is read here, before a rank touches one.
        idle = gpus.used_bytes() if gpus else {}
        for rank in self.ranks:
            ends = self._ends[rank] = _Ends()
            at_s = time.monotonic()
            pid = server.start(self._job.order(rank.number, references), (*ends.theirs(), *self._job.streams))
            ends.hand_over()
            rank.started(Observer(pid, gpus, idle, self.timeline, rank.number), no_gpus, at_s)

    def take_turn(self, *, alone: bool = False) -> None:
        """Wait until the job may go on, alone or beside others."""
        if self._turn is None:
            return
        asked_at = time.monotonic()
        (self._turn.alone if alone else self._turn.share)()
        self.waited_s += time.monotonic() - asked_at

    def to_the_end(self, timeout_s: float) -> None:
        """Hear and observe the ranks until they are gone; one that ends before it is done takes the others along.

        Raises:
            ForkServerLost: if the fork server is gone.
            KeyboardInterrupt: where the user interrupts a job of which nothing is kept then.
        """
        deadline = time.monotonic() - self.waited_s + timeout_s
        try:
            self._follow(deadline)
        except KeyboardInterrupt:
            if not all(rank.survives_interrupts for rank in self.ranks):
                raise
            for rank in self.ranks:
                rank.interrupt()
            self._kill()
            self._follow(deadline)
        for rank in self.ranks:
            rank.ended(self._ended[rank])

    def _kill(self) -> None:
        assert self._server is not None
        self._server.kill()

    def _follow(self, deadline: float) -> None:
        assert self._server is not None
        pipes = {self._ends[rank].pipe.fileno(): rank for rank in self.ranks}
        outputs = {self._ends[rank].output: rank for rank in self.ranks}
        sources = [self._server.fileno(), *pipes, *outputs]
        rests_until = 0.0
        self._take_up_ends(wait=False)  # one rank may have ended while another was started
        while len(self._ended) < len(self.ranks) or self._is_awaited(sources, pipes, outputs):
            ready, _, _ = select.select(sources, [], [], self._job.settings.sampling_interval_s)
            for source in ready:
                if source in outputs and not self._read_output(outputs[source]):
                    sources.remove(source)
            for source in ready:
                if source in pipes and not self._read_pipe(pipes[source]):
                    sources.remove(source)
            if self._server.fileno() in ready and len(self._ended) < len(self.ranks):
                self._take_up_ends(wait=True)
                if len(self._ended) == len(self.ranks):
                    sources.remove(self._server.fileno())
            if len(self._ended) < len(self.ranks):
                rests_until = self._look(rests_until)
                if not self.timed_out and time.monotonic() - self.waited_s > deadline:
                    self.timed_out = True
                    self._kill()

    def _is_awaited(self, sources: Sequence[int], pipes: dict[int, Rank], outputs: dict[int, Rank]) -> bool:
        """Whether something may still come of a rank that has ended."""
        return any(source in pipes or (source in outputs and outputs[source].is_heard_to_the_end) for source in sources)

    def _read_output(self, rank: Rank) -> bool:
        """Take up what a rank printed; ``False`` at its end."""
        data = os.read(self._ends[rank].output, _LARGEST_READ_BYTES)
        rank.print_out(data)
        return bool(data)

    def _read_pipe(self, rank: Rank) -> bool:
        """Take up what a rank said; ``False`` at its end."""
        ends = self._ends[rank]
        try:
            data = ends.pipe.recv(_LARGEST_READ_BYTES)
        except ConnectionResetError:
            data = b""
        *lines, ends.unread = (ends.unread + data).split(b"\n")
        for line in lines:
            try:
                self._hear(rank, decode(line))
            except BrokenMessage as error:
                rank.status, rank.message = "failed", str(error)
                self._kill()
        return bool(data)

    def _hear(self, rank: Rank, message: Message) -> None:
        match message:
            case PhaseBegins() | PhaseEnds():
                # A phase is the same for all: nobody goes on before the last has arrived.
                self._arrived[rank] = message
                if len(self._arrived) == len(self.ranks):
                    self._pass_boundary(message)
            case MarkEntered() | MarkLeft():
                rank.hear(message)
                self._acknowledge(rank)
            case _:
                rank.hear(message)

    def _pass_boundary(self, message: PhaseBegins | PhaseEnds) -> None:
        arrived, self._arrived = self._arrived, {}
        if isinstance(message, PhaseBegins):
            self.take_turn(alone=message.phase == "time")
        for rank, own in arrived.items():
            rank.hear(own)
        if isinstance(message, PhaseEnds):
            self.take_turn()
        for rank in arrived:
            self._acknowledge(rank)

    def _acknowledge(self, rank: Rank) -> None:
        with contextlib.suppress(OSError):
            self._ends[rank].pipe.sendall(ACKNOWLEDGED)

    def _take_up_ends(self, *, wait: bool) -> None:
        """Hear how ranks ended. If one is gone before it is done, the others wait for it in vain: they are ended."""
        assert self._server is not None
        ended = self._server.ended(wait=wait)
        while ended is not None:
            for rank in self.ranks:
                if rank.pid == ended.pid:
                    self._ended[rank] = ended
                    if not rank.is_done and len(self.ranks) > 1:
                        self._kill()
            ended = self._server.ended(wait=False)

    def _look(self, rests_until: float) -> float:
        """Take a sample of each rank, if it is time to; when the next may be taken."""
        began = time.monotonic()
        if began < rests_until:
            return rests_until
        samples = [rank.observer.look() for rank in self.ranks if rank not in self._ended]
        if seen := [sample.held_bytes for sample in samples if sample is not None]:
            self._tell("memory", {"bytes": sum(seen)})
        if any(rank.phase == "time" for rank in self.ranks):
            return began + (time.monotonic() - began) / _SHARE_OF_LOOKING
        return rests_until

    @property
    def decisive(self) -> Rank:
        """The rank that says how the job ended: of those that did not end well the first to go."""
        failed = [rank for rank in self.ranks if rank.status != "ok" and rank in self._ended]
        return min(failed, key=lambda rank: self._ended[rank].at_s, default=self.ranks[0])

    def judge(self, timeout_s: float, oom_kills_before: int | None) -> None:
        """Settle the status of each rank that did not say it itself."""
        for rank in self.ranks:
            if rank.status is None:
                _judge(rank, self._ended[rank].status, self.timed_out, timeout_s, oom_kills_before)
            if rank.message and (said := rank.last_words()):
                rank.message += f": {said}"


def memory_ran_out(oom_kills_before: int | None) -> bool:
    """Whether the kernel has killed a process for memory since it had killed so many."""
    now = procfs.oom_kills()
    return None not in (oom_kills_before, now) and now != oom_kills_before


def _judge(rank: Rank, exited: int, timed_out: bool, timeout_s: float, oom_kills_before: int | None) -> None:
    if rank.is_done:
        rank.status, rank.phase = "ok", None
    elif timed_out:
        rank.status, rank.message = "timeout", f"not done after {timeout_s:g} s"
    elif os.WIFSIGNALED(exited):
        number = os.WTERMSIG(exited)
        if number == signal.SIGKILL and memory_ran_out(oom_kills_before):
            rank.status, rank.message = "out-of-memory", "killed by the kernel for want of memory"
        else:
            rank.status, rank.message = "crashed", f"killed by {signal.Signals(number).name}"
    else:
        rank.status = "crashed"
        rank.message = f"ended with exit code {os.WEXITSTATUS(exited)} before it was done"
