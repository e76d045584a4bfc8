"""What the runner and the fork server say to each other, a packet a message.

The fork server imports this before anything else: it stays small, so that what a user's program is forked from does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias


@dataclass(frozen=True)
class StartWorker:
    """Start one worker of a job; its pipe and its output come with the packet as file descriptors.

    Attributes:
        request: what the worker is to do, as ``protocol.requests`` encodes it; the fork server adds its scratch folder.
        rank: which of the job's workers it is.
        isolation: ``fork`` from what is imported already, or ``spawn`` an interpreter of its own.
    """

    order: ClassVar[str] = "worker"
    request: Mapping[str, Any]
    rank: int
    isolation: Literal["fork", "spawn"]
    grace_s: float = 0.0


@dataclass(frozen=True)
class StartProgram:
    """Start a user's program; with the packet come its pipe, its standard error, its standard input and output.

    Attributes:
        grace_s: how long processes that outlive it may take to end by themselves, before they are killed and named.
    """

    order: ClassVar[str] = "program"
    command: Sequence[str]
    rank: int
    grace_s: float


@dataclass(frozen=True)
class Kill:
    """Kill all workers, with their descendants."""

    order: ClassVar[str] = "kill"


Order: TypeAlias = StartWorker | StartProgram | Kill


@dataclass(frozen=True)
class Ready:
    """All is imported: workers can be started."""

    answer: ClassVar[str] = "ready"


@dataclass(frozen=True)
class Started:
    """A worker was started."""

    answer: ClassVar[str] = "started"
    pid: int


@dataclass(frozen=True)
class WorkerEnded:
    """How a worker ended.

    Attributes:
        status: as ``os.waitpid`` returns it.
        at_s: when, by the monotonic clock.
        peak_bytes: the kernel's peak since it was last reset: of the worker, of what it was forked from, or of a child
            that it waited for, whichever is the highest.
        forked_from_bytes: at most so much of that was there before a program was started.
        had_children: whether it waited for one.
        left: the names of processes that outlived it for longer than the grace that they had, and were killed.
    """

    answer: ClassVar[str] = "ended"
    pid: int
    status: int
    at_s: float
    peak_bytes: int
    forked_from_bytes: int
    had_children: bool
    left: Sequence[str] = field(default=())


Answer: TypeAlias = Ready | Started | WorkerEnded

_ORDERS: Mapping[str, type[Order]] = {each.order: each for each in (StartWorker, StartProgram, Kill)}
_ANSWERS: Mapping[str, type[Answer]] = {each.answer: each for each in (Ready, Started, WorkerEnded)}


def encode_order(order: Order) -> bytes:
    """An order as a packet."""
    return json.dumps({"order": order.order, **asdict(order)}).encode()


def decode_order(packet: bytes) -> Order:
    """The order in a packet, which the runner of the same version encoded."""
    said = json.loads(packet)
    return _ORDERS[said.pop("order")](**said)


def encode_answer(answer: Answer) -> bytes:
    """An answer as a packet."""
    return json.dumps({"answer": answer.answer, **asdict(answer)}).encode()


def decode_answer(packet: bytes) -> Answer:
    """The answer in a packet, which the fork server of the same version encoded."""
    said = json.loads(packet)
    return _ANSWERS[said.pop("answer")](**said)
