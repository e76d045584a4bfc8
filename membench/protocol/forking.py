"""Messages between the runner and the fork server, one per packet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias


@dataclass(frozen=True)
class StartWorker:
    """Order to start one worker of a job; its pipe and its output are sent with the packet as file descriptors.

    Attributes:
        request: the worker's request as encoded by ``protocol.requests``; the fork server adds the scratch folder.
        rank: the rank of the worker in its job.
        isolation: ``fork`` from the process with the preloaded modules, or ``spawn`` a new interpreter.
    """

    order: ClassVar[str] = "worker"
    request: Mapping[str, Any]
    rank: int
    isolation: Literal["fork", "spawn"]
    grace_s: float = 0.0


@dataclass(frozen=True)
class StartProgram:
    """Order to start a user's program.

    Its pipe, standard error, standard input and standard output are sent with the packet as file descriptors.

    Attributes:
        grace_s: seconds that processes which outlive it have to end by themselves, before they are killed.
        variables: environment variables that it has besides those of membench itself.
    """

    order: ClassVar[str] = "program"
    command: Sequence[str]
    rank: int
    grace_s: float
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kill:
    """Order to kill all workers and their descendants."""

    order: ClassVar[str] = "kill"


Order: TypeAlias = StartWorker | StartProgram | Kill


@dataclass(frozen=True)
class Importing:
    """Answer: the import of a module begins."""

    answer: ClassVar[str] = "importing"
    module: str


@dataclass(frozen=True)
class Ready:
    """Answer: all imports are done, and workers can be started."""

    answer: ClassVar[str] = "ready"


@dataclass(frozen=True)
class Started:
    """Answer: a worker was started.

    Attributes:
        at_s: the time of its start, by the monotonic clock.
    """

    answer: ClassVar[str] = "started"
    pid: int
    at_s: float


@dataclass(frozen=True)
class WorkerEnded:
    """Answer: a worker ended.

    Attributes:
        status: the exit status as returned by ``os.waitpid``.
        at_s: the time of its end, by the monotonic clock.
        peak_bytes: the kernel's peak since the last reset: the maximum of the worker, of the process it was forked
            from, and of the children that it waited for.
        inherited_peak_bytes: for a program, an upper bound of the peak of the process that it was forked from.
        had_children: whether it waited for child processes.
        left: names of the processes that outlived its grace period and were killed.
        unkilled: names and ids of the processes that could not be killed.
        used_s: for how long its threads ran, and those of the children that it waited for, summed.
    """

    answer: ClassVar[str] = "ended"
    pid: int
    status: int
    at_s: float
    peak_bytes: int
    inherited_peak_bytes: int
    had_children: bool
    left: Sequence[str] = field(default=())
    unkilled: Sequence[str] = field(default=())
    used_s: float = 0.0


Answer: TypeAlias = Importing | Ready | Started | WorkerEnded

_ORDERS: Mapping[str, type[Order]] = {each.order: each for each in (StartWorker, StartProgram, Kill)}
_ANSWERS: Mapping[str, type[Answer]] = {each.answer: each for each in (Importing, Ready, Started, WorkerEnded)}


def encode_order(order: Order) -> bytes:
    """Encode an order as a packet."""
    return json.dumps({"order": order.order, **asdict(order)}).encode()


def decode_order(packet: bytes) -> Order:
    """Decode the order in a packet from a runner of the same version."""
    fields = json.loads(packet)
    return _ORDERS[fields.pop("order")](**fields)


def encode_answer(answer: Answer) -> bytes:
    """Encode an answer as a packet."""
    return json.dumps({"answer": answer.answer, **asdict(answer)}).encode()


def decode_answer(packet: bytes) -> Answer:
    """Decode the answer in a packet from a fork server of the same version."""
    fields = json.loads(packet)
    return _ANSWERS[fields.pop("answer")](**fields)
