"""One process (rank) of a running job: its messages, its output and the readings so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_args

from membench.errors import one_line
from membench.host import last_words
from membench.host.device import Device
from membench.protocol.forking import WorkerEnded
from membench.protocol.messages import (
    AsksForEstimate,
    BaselineTaken,
    BrokenMessage,
    Done,
    EndedBadly,
    GpuFound,
    Message,
    OptionsRefused,
    PhaseBegins,
    PhaseEnds,
    Progress,
    Result,
    ResultSoFar,
)
from membench.protocol.readings import Baseline, GpuReading, PhaseReading, ProcessReading
from membench.records.record import Status
from membench.running.observer import Observer

Tell = Callable[[str, Mapping[str, Any]], None]
"""Callback for the events of a run: name and details, as ``session.run`` lists them."""

_HEAD_BYTES, _TAIL_BYTES = 2048, 4096
"""How much of the output is kept in a record."""
_LOOKED_AT_BYTES = 65536
"""How much of the end of the output is looked at for what it says of the end: a launcher prints much for many ranks."""
_MOST_PHASES = 100
_LONGEST_TEXT, _LONGEST_QUOTE = 2000, 80


class Rank:
    """A worker that measures cases or functions; other kinds of jobs subclass it."""

    role: ClassVar[str] = "worker"
    reads_output_to_end: ClassVar[bool] = False
    """Whether output is read until the last process that may print has closed it."""
    keeps_record_on_interrupt: ClassVar[bool] = False
    """Whether its record is kept if the user interrupts the job."""

    def __init__(self, number: int, device: Device, tell: Tell) -> None:
        self.number, self.device, self._tell = number, device, tell
        self.pid: int | None = None
        self.status: Status | None = None
        self.phase: str | None = None
        self.message: str | None = None
        self.phases: list[PhaseReading] = []
        self.result: Result | None = None
        self._head, self._tail, self._output_bytes = b"", bytearray(), 0
        self.is_done = False
        self.is_interrupted = False
        self.refused: list[tuple[str, str]] = []
        self.asks_for_estimate: AsksForEstimate | None = None
        self._measuring: str | None = None
        self._begun: set[str] = set()
        self._observer: Observer | None = None
        self._baseline: Baseline | None = None
        self._gpu: GpuReading | None = None
        self._gpu_unknown: str | None = None

    @property
    def observer(self) -> Observer:
        """The observer of the process, once it has been started."""
        assert self._observer is not None, "it has been started"
        return self._observer

    def on_start(self, observer: Observer, no_gpus: str | None, at_s: float) -> None:
        """Attach the observer of the started process.

        Args:
            no_gpus: the reason if NVML is not available.
            at_s: the time of its start, by the monotonic clock.
        """
        self.pid, self._observer, self._no_gpus, self.started_at_s = observer.pid, observer, no_gpus, at_s

    def close(self) -> None:
        """Stop observing the process."""
        if self._observer:
            self._observer.close()

    def check_order(self, message: PhaseBegins | PhaseEnds) -> None:
        """Check that a phase begins once and outside of others, and ends only after it has begun.

        Raises:
            BrokenMessage: if it does not.
        """
        if isinstance(message, PhaseEnds):
            name = message.reading.name
            if name != self._measuring:
                raise BrokenMessage(f"a worker ended phase {_quoted(name)}, which had not begun")
            self._measuring = None
            return
        name = message.phase
        if self._measuring is not None:
            raise BrokenMessage(f"a worker began phase {_quoted(name)} within phase {_quoted(self._measuring)}")
        if name in self._begun:
            raise BrokenMessage(f"a worker began phase {_quoted(name)} a second time")
        if len(self._begun) == _MOST_PHASES:
            raise BrokenMessage(f"a worker began more than {_MOST_PHASES} phases")
        self._begun.add(name)
        self._measuring = name

    def handle(self, message: Message) -> None:
        """Process a message of the worker.

        Raises:
            BrokenMessage: if this kind of worker does not send such a message.
        """
        match message:
            case PhaseBegins():
                self.phase = message.phase
                self.observer.begin_phase()
                self._tell("phase", {"phase": message.phase})
            case PhaseEnds():
                seen = self.observer.end_phase()
                seen.gpu_unknown = self._gpu_unknown or seen.gpu_unknown
                self.phases.append(seen.complete(message.reading))
            case BaselineTaken():
                self._baseline = message.baseline
                self._tell("baseline", {"bytes": message.baseline.resident_bytes})
            case GpuFound():
                self._gpu = message.gpu
                self._gpu_unknown = self.observer.use_gpu(message.gpu.uuid or "") or self._no_gpus
            case ResultSoFar():
                self.result = message.result
            case EndedBadly():
                if message.status not in get_args(Status) or message.status == "ok":
                    raise BrokenMessage(f"a worker ended badly as {_quoted(message.status)}, which is no such status")
                self.status, self.message = message.status, message.message[:_LONGEST_TEXT]  # type: ignore[assignment]
                self.phase = message.phase and message.phase[:_LONGEST_TEXT]
            case AsksForEstimate():
                self.asks_for_estimate = message
            case Done():
                self.is_done = True
            case OptionsRefused():
                self.refused.append((message.name, message.problem))
            case Progress():
                self._tell("progress", dataclasses.asdict(message))
            case _:
                raise BrokenMessage(f"a worker marks no phases of its own: {_quoted(message.phase)}")

    def add_output(self, data: bytes) -> None:
        """Keep the beginning and the end of what the process printed."""
        self._output_bytes += len(data)
        self._head += data[: _HEAD_BYTES - len(self._head)]
        self._tail += data
        if len(self._tail) > 2 * _LOOKED_AT_BYTES:
            del self._tail[:-_LOOKED_AT_BYTES]

    @property
    def said(self) -> str:
        """The end of the output, as much as is looked at."""
        return self._tail[-_LOOKED_AT_BYTES:].decode(errors="replace")

    def output(self) -> str:
        """Return the output for the record: of a long one the beginning and the end."""
        left_out = self._output_bytes - _HEAD_BYTES - _TAIL_BYTES
        if left_out <= 0:
            return self.said
        head, tail = self._head.decode(errors="replace"), self._tail[-_TAIL_BYTES:].decode(errors="replace")
        return f"{head}\n[{left_out} bytes are left out]\n{tail}"

    def interrupt(self) -> None:
        """Record that the user interrupted the job."""
        self.is_interrupted = True

    def on_end(self, ended: WorkerEnded, *, kernel_killed: bool) -> None:
        """Process the end of the process; ``RunningJob.settle_status`` sets a status that is still missing.

        Args:
            kernel_killed: whether the kernel has killed any process for lack of memory since the job was started.
        """

    def ended_well(self, ended: WorkerEnded) -> bool:
        """Whether the process ended after it had done all, as far as is known when it ends."""
        del ended
        return self.is_done

    @property
    def says_where_it_is(self) -> bool:
        """Whether it writes its stack when it is asked: a worker that is one of several ranks does."""
        return True

    @property
    def blames_another(self) -> bool:
        """Whether it failed because another rank had failed, as far as it has said."""
        return self.status == "failed" and last_words.are_of_another(self.message or "")

    def last_line(self) -> str:
        """Return its last line of output if that explains how it ended, else an empty string."""
        return ""

    def launched(self) -> tuple[ProcessReading, ...]:
        """Return the readings of the ranks that the process started itself; a worker starts none."""
        return ()

    def reading(self) -> ProcessReading:
        """Return all readings of the process for the record."""
        result = self.result or Result(pinned=False)
        known = self.result is not None
        return ProcessReading(
            role=self.role,
            rank=self.number,
            device=str(self.device),
            pid=self.pid,
            gpu=self._gpu,
            baseline=self._baseline,
            phases=tuple(self.phases),
            durations_s=result.durations_s if known else None,
            waited_s=result.waited_s,
            passive=result.passive,
            wait_policy=result.wait_policy,
            slept_s=result.slept_s,
            corpus=result.corpus,
            losses_nats=result.losses_nats,
            modules_bytes=result.modules_bytes,
            breakdown_bytes=result.breakdown_bytes,
            peak_part=result.peak_part,
            communicated_bytes=result.communicated_bytes,
            quality=result.quality,
            exit_code=result.exit_code,
        )


def _quoted(name: str) -> str:
    return f"'{one_line(name[:_LONGEST_QUOTE])}'"
