"""A running job: starts its ranks, handles their messages, observes them to their end and sets their status."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Protocol

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
from membench.running import where_it_hung
from membench.running.channels import Channels
from membench.running.fork_client import ForkServer, ForkServerLost, ForkServerSilent
from membench.running.job_ending import ending_of_lost, kernel_killed_for_memory, settle_status
from membench.running.jobs.runnable import RunnableJob
from membench.running.observer import Observer
from membench.running.rank import Rank, Tell
from membench.running.references import References
from membench.running.timeline import Timeline

_SAMPLING_SHARE = 0.1
"""The largest share of a core that sampling may take during timed steps: reading the memory of a child process walks
its page tables, which takes milliseconds."""
_END_TIMEOUT_S = 12
"""Seconds in which killed ranks must have ended: more than the fork server waits for their descendants."""
_ANSWER_WITHIN_S = 0.5
"""Seconds that ranks have to write where they are before they are killed."""
_OTHERS_WITHIN_S = 10.0
"""Seconds that the others have to end by themselves after a rank that failed because another one had failed."""
_REPORT_TIMEOUT_S = 60
"""Seconds in which the end of ranks that have done all must be reported; to give back much memory takes a while."""
_DRAIN_TIMEOUT_S, _LONGEST_DRAIN_S = 2, 10
"""Seconds of silence, and seconds in all, after which nothing more of ranks that have ended is read."""
_LARGEST_READ_BYTES = 65536
_LARGEST_LINE_BYTES, _LARGEST_OF_A_STEP_BYTES = 2**24, 4000
"""The longest message: what does not grow with the number of timed steps, and the durations of a step's parts."""


class Turn(Protocol):
    """Coordinates runners that share a machine. Each method blocks until the runner may continue."""

    def share(self) -> None:
        """Run concurrently with other shared runners, but not with an exclusive one."""

    def alone(self) -> None:
        """Run exclusively."""

    def leave(self) -> None:
        """Release the turn."""


class RunningJob:
    """A job that runs on one or more ranks. Use as a context manager.

    Attributes:
        ranks: its processes.
        timeline: the memory of all ranks over time.
        waited_s: seconds spent waiting for a turn.
        timed_out: whether the job was killed because it exceeded its time limit.
        is_lost: whether the fork server was lost, so that how the ranks ended is not known.
    """

    def __init__(self, job: RunnableJob, turn: Turn | None, tell: Tell) -> None:
        self.ranks: Sequence[Rank] = [job.rank(number, tell) for number in range(job.device.count)]
        self.timeline = Timeline()
        self.waited_s = 0.0
        self.timed_out = self.is_lost = False
        self._job, self._turn, self._tell = job, turn, tell
        self._server: ForkServer | None = None
        self._channels: dict[Rank, Channels] = {}
        self._ended: dict[Rank, WorkerEnded] = {}
        self._arrived: dict[Rank, PhaseBegins | PhaseEnds] = {}
        self._waits_at_boundary: frozenset[Rank] = frozenset()
        self._killed_at_s: float | None = None
        self._kill_at_s: float | None = None
        self._heard_at_s = 0.0
        self._done_at_s: float | None = None
        self._all_ended_at_s: float | None = None

    def __enter__(self) -> RunningJob:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._server:
            self._server.kill()
        if self._turn:
            self._turn.leave()
        for rank in self.ranks:
            rank.close()
        for channels in self._channels.values():
            channels.close()

    def start(
        self, server: ForkServer, timeout_s: float, gpus: Gpus | None, no_gpus: str | None, references: References
    ) -> None:
        """Start all ranks.

        Raises:
            ForkServerLost: if the fork server is gone, or does not answer.
        """
        self._server = server
        # The idle level of the GPUs must be read before a rank uses one.
        idle = gpus.used_bytes() if gpus else {}
        for rank in self.ranks:
            channels = self._channels[rank] = Channels()
            order, streams = self._job.order(rank.number, references), (*channels.for_rank(), *self._job.streams)
            started = server.start(order, streams, timeout_s)
            channels.close_for_rank()
            rank.on_start(Observer(started.pid, gpus, idle, self.timeline, rank.number), no_gpus, started.at_s)

    def wait_for_turn(self, *, alone: bool = False) -> None:
        """Wait until the job may continue, exclusively or concurrently with others."""
        if self._turn is None:
            return
        asked_at = time.monotonic()
        (self._turn.alone if alone else self._turn.share)()
        self.waited_s += time.monotonic() - asked_at

    def run_to_end(self, timeout_s: float, oom_kills_before: int | None) -> None:
        """Handle messages and observe the ranks until all have ended. If one ends early, the others are killed.

        Raises:
            ForkServerLost: if the fork server is gone.
            ForkServerSilent: if ranks do not end that were to be killed.
            KeyboardInterrupt: if the user interrupts a job whose record is not kept in that case.
        """
        deadline = time.monotonic() - self.waited_s + timeout_s
        try:
            self._wait_for_ranks(deadline)
        except KeyboardInterrupt:
            if not all(rank.keeps_record_on_interrupt for rank in self.ranks):
                raise
            for rank in self.ranks:
                rank.interrupt()
            self._kill()
            self._wait_for_ranks(deadline)
        kernel_killed = kernel_killed_for_memory(oom_kills_before)
        for rank in self.ranks:
            rank.on_end(self._ended[rank], kernel_killed=kernel_killed)

    def _kill(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._killed_at_s = self._killed_at_s or time.monotonic()

    def _wait_for_ranks(self, deadline: float) -> None:
        assert self._server is not None
        pipes = {self._channels[rank].pipe.fileno(): rank for rank in self.ranks}
        outputs = {self._channels[rank].output: rank for rank in self.ranks}
        sources = [self._server.fileno(), *pipes, *outputs]
        next_sample_at_s = 0.0
        self._collect_ended(wait=False)  # a rank may have ended while another was started
        while len(self._ended) < len(self.ranks) or self._may_hear_more(sources, pipes, outputs):
            ready, _, _ = select.select(sources, [], [], self._job.settings.sampling_interval_s)
            if ready:
                self._heard_at_s = time.monotonic()
            for source in ready:
                if source in outputs and not self._read_output(outputs[source]):
                    sources.remove(source)
            for source in ready:
                if source in pipes and not self._read_pipe(pipes[source]):
                    sources.remove(source)
            if self._server.fileno() in ready and len(self._ended) < len(self.ranks):
                self._collect_ended(wait=True)
                if len(self._ended) == len(self.ranks):
                    sources.remove(self._server.fileno())
            if len(self._ended) < len(self.ranks):
                next_sample_at_s = self._look(next_sample_at_s)
                self._hold_to_time(deadline)

    def _hold_to_time(self, deadline: float) -> None:
        """Have the ranks killed when their time is over.

        Raises:
            ForkServerSilent: if that does not end them, or if ends are not reported.
        """
        now = time.monotonic()
        if all(rank.is_done for rank in self.ranks):
            self._done_at_s = self._done_at_s or now  # a function may print without end
            if now - self._done_at_s > _REPORT_TIMEOUT_S:
                within = f"within {_REPORT_TIMEOUT_S} s"
                raise ForkServerSilent(f"measured, but the fork server did not report its end {within}")
            return
        if not self.timed_out and now - self.waited_s > deadline:
            self.timed_out = True
            self._time_out(now)
        if self._kill_at_s is not None and now > self._kill_at_s:
            self._kill_at_s = None
            self._kill()
        if self._killed_at_s is not None and now - self._killed_at_s > _END_TIMEOUT_S:
            raise ForkServerSilent(f"it did not end within {_END_TIMEOUT_S} s when it was to be killed")

    def _time_out(self, now: float) -> None:
        """Have the ranks killed; several are asked where they are before that, to tell which one hangs."""
        self._waits_at_boundary = frozenset(self._arrived)
        asked = [rank for rank in self.ranks if rank not in self._ended and rank.says_where_it_is]
        if not self._job.device.in_ranks or not asked:
            self._kill()
            return
        for rank in asked:
            where_it_hung.ask(rank)
        self._kill_at_s = now + _ANSWER_WITHIN_S

    def _may_hear_more(self, sources: Sequence[int], pipes: dict[int, Rank], outputs: dict[int, Rank]) -> bool:
        """Whether data of a rank that has ended may still arrive; a process elsewhere may hold its pipes open."""
        now = time.monotonic()
        self._all_ended_at_s = self._all_ended_at_s or now
        if now - self._heard_at_s > _DRAIN_TIMEOUT_S or now - self._all_ended_at_s > _LONGEST_DRAIN_S:
            return False
        return any(source in pipes or (source in outputs and outputs[source].reads_output_to_end) for source in sources)

    def _read_output(self, rank: Rank) -> bool:
        """Read the output of a rank; return ``False`` at its end."""
        data = os.read(self._channels[rank].output, _LARGEST_READ_BYTES)
        rank.add_output(data)
        return bool(data)

    def _read_pipe(self, rank: Rank) -> bool:
        """Read and handle messages of a rank; return ``False`` at the end of its pipe."""
        channels = self._channels[rank]
        try:
            data = channels.pipe.recv(_LARGEST_READ_BYTES)
        except ConnectionResetError:
            data = b""
        if channels.is_broken:
            return bool(data)
        steps = self._job.steps
        longest_bytes = _LARGEST_LINE_BYTES + _LARGEST_OF_A_STEP_BYTES * (steps.warmup + steps.measured)
        try:
            for line in channels.lines(data, longest_bytes):
                self._handle(rank, decode(line))
        except BrokenMessage as error:
            # Nothing that it sends later can be trusted.
            channels.is_broken = True
            self._arrived.pop(rank, None)
            rank.status, rank.message = "failed", str(error)
            self._kill()
        return bool(data)

    def _handle(self, rank: Rank, message: Message) -> None:
        match message:
            case PhaseBegins() | PhaseEnds():
                rank.check_order(message)
                self._arrived[rank] = message
                self._pass_boundary()
            case MarkEntered() | MarkLeft():
                rank.handle(message)
                self._acknowledge(rank)
            case _:
                rank.handle(message)

    def _pass_boundary(self) -> None:
        """Let the ranks continue once all that have not ended are at the same boundary of a phase."""
        if not self._arrived or any(rank not in self._arrived for rank in self.ranks if rank not in self._ended):
            return
        arrived, self._arrived = self._arrived, {}
        first, *others = arrived.values()
        if any(_boundary(other) != _boundary(first) for other in others):
            for rank in arrived:
                rank.status, rank.message = "failed", "the ranks go through different phases"
            self._kill()
            return
        if isinstance(first, PhaseBegins):
            self.wait_for_turn(alone=first.phase == "time")
        for rank, own in arrived.items():
            rank.handle(own)
        if isinstance(first, PhaseEnds):
            self.wait_for_turn()
        for rank in arrived:
            self._acknowledge(rank)

    def _acknowledge(self, rank: Rank) -> None:
        # A worker that reads no answers must not hold up this process once their buffer is full.
        with contextlib.suppress(OSError):
            self._channels[rank].pipe.send(ACKNOWLEDGED, socket.MSG_DONTWAIT)

    def _collect_ended(self, *, wait: bool) -> None:
        """Collect ranks that have ended. If one ended early the others are killed: they would wait for it forever."""
        assert self._server is not None
        ended = self._server.next_ended(wait=wait)
        while ended is not None:
            for rank in self.ranks:
                if rank.pid == ended.pid:
                    self._end(rank, ended)
            ended = self._server.next_ended(wait=False)

    def _end(self, rank: Rank, ended: WorkerEnded) -> None:
        """Take in the end of a rank. If it ended early, the others are killed."""
        pipe = self._channels[rank].pipe
        while select.select([pipe], [], [], 0)[0] and self._read_pipe(rank):
            pass  # its last messages say whether it is done
        self._ended[rank] = ended
        self._arrived.pop(rank, None)
        self.timeline.end(rank.number)
        if not rank.ended_well(ended) and len(self.ranks) > 1:
            if rank.blames_another:  # the other one may be about to say why it fails
                self._kill_at_s = self._kill_at_s or time.monotonic() + _OTHERS_WITHIN_S
            else:
                self._kill()
        self._pass_boundary()

    def _look(self, next_sample_at_s: float) -> float:
        """Sample each rank if a sample is due; return when the next is due, by the monotonic clock."""
        began = time.monotonic()
        if began < next_sample_at_s:
            return next_sample_at_s
        samples = [rank.observer.sample() for rank in self.ranks if rank not in self._ended]
        if seen := [sample.held_bytes for sample in samples if sample is not None]:
            self._tell("memory", {"bytes": sum(seen)})
        if any(rank.phase == "time" for rank in self.ranks):
            return began + (time.monotonic() - began) / _SAMPLING_SHARE
        return next_sample_at_s

    @property
    def unkilled(self) -> list[str]:
        """Names and ids of processes that the ranks started and that could not be killed."""
        return [name for ended in self._ended.values() for name in ended.unkilled]

    def settle_lost(
        self, error: ForkServerLost, unkilled: Sequence[str], timeout_s: float, oom_kills_before: int | None
    ) -> None:
        """Set the status of each rank after the fork server was lost; what a rank reported before stays."""
        self.is_lost = True
        is_interrupted = any(rank.is_interrupted for rank in self.ranks)
        status, message = ending_of_lost(error, self.timed_out, timeout_s, oom_kills_before)
        for rank in self.ranks:
            if is_interrupted:
                rank.status, rank.message = "crashed", "interrupted"
            elif rank.status in (None, "ok"):
                rank.status, rank.message = status, message
            if unkilled:
                rank.message = f"{rank.message}; cannot be killed, and still running: {', '.join(unkilled)}"

    @property
    def deciding_rank(self) -> Rank:
        """The rank that determines the status of the job: the first that failed by itself, else rank 0.

        A rank that failed because another one had failed may end before it, and one that waits is killed like the one
        that hangs.
        """
        failed = [rank for rank in self.ranks if rank.status != "ok" and rank in self._ended]
        if self.timed_out:
            waits = [rank for rank in failed if rank in self._waits_at_boundary or where_it_hung.waits_for_others(rank)]
            failed = [rank for rank in failed if rank not in waits] or failed
        return min(failed, key=lambda rank: (rank.blames_another, self._ended[rank].at_s), default=self.ranks[0])

    def settle_status(self, timeout_s: float, oom_kills_before: int | None) -> None:
        """Set the status of each rank that did not report one, or not the right one."""
        for rank in self.ranks:
            settle_status(rank, self._ended[rank].status, self.timed_out, timeout_s, oom_kills_before)
            if rank.message and (line := rank.last_line()):
                rank.message += f": {line}"


def _boundary(message: PhaseBegins | PhaseEnds) -> tuple[type, str]:
    return type(message), message.phase if isinstance(message, PhaseBegins) else message.reading.name
