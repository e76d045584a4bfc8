"""Messages of a worker to the runner, one line of JSON each, and their encoding.

The runner acknowledges the boundaries of phases and answers no other message.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from pydantic import StrictBool, TypeAdapter, ValidationError

from membench.errors import MembenchError, one_line
from membench.protocol.readings import (
    Baseline,
    Count,
    GpuReading,
    ModulesReading,
    Number,
    PhaseReading,
    QualityReading,
    RankEstimate,
    Reading,
    Seconds,
    SignedSize,
    Size,
    plain,
)

ACKNOWLEDGED = b"go\n"
"""The runner's answer at the boundary of a phase."""

_LONGEST_QUOTE = 80


class BrokenMessage(MembenchError):
    """Data from a worker's pipe is not a valid message, or a message is missing or out of place."""


@dataclass(frozen=True)
class PhaseBegins(Reading):
    """A phase of a worker begins as soon as the runner has acknowledged this message."""

    event: ClassVar[str] = "begin"
    phase: str


@dataclass(frozen=True)
class PhaseEnds(Reading):
    """A phase has ended, with the readings of the worker's meter."""

    event: ClassVar[str] = "end"
    reading: PhaseReading


@dataclass(frozen=True)
class MarkEntered(Reading):
    """A user's program enters a marked phase."""

    event: ClassVar[str] = "enter"
    phase: str


@dataclass(frozen=True)
class MarkLeft(Reading):
    """A user's program leaves a marked phase; ``raised`` is the type of the exception that ended it, if any."""

    event: ClassVar[str] = "leave"
    phase: str
    raised: str | None = None


@dataclass(frozen=True)
class BaselineTaken(Reading):
    """The worker has measured its baseline, to which its memory readings refer."""

    event: ClassVar[str] = "baseline"
    baseline: Baseline


@dataclass(frozen=True)
class GpuFound(Reading):
    """The GPU that the worker runs on; the runner finds it in NVML by UUID, because NVML orders devices differently."""

    event: ClassVar[str] = "device"
    gpu: GpuReading


@dataclass(frozen=True)
class Fact(Reading):
    """A value that a stage reported, and its source."""

    value: Number
    source: str


@dataclass(frozen=True)
class CustomFigure(Reading):
    """The value of a plug-in's quality metric, or the reason why it is unknown."""

    value: Number | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result(Reading):
    """The results of a worker besides its phases.

    Attributes:
        pinned: whether the C library's allocator was pinned, which makes resident memory equal to live memory.
        is_trained: whether the model is trained, which makes its held-out loss meaningful.
        unjudged: the reason why the held-out loss of a trained model says nothing about it.
        durations_s, waited_s, passive, wait_policy, slept_s: of the timed steps; see ``ProcessReading``.
        tokens_per_step: tokens per step without padding; ``None`` if steps have no tokens.
        epoch_bytes: packed bytes that a step reads, if a step reads an epoch.
        computing_bits: the bits of the coarsest numbers that a step of training computes with or keeps.
        decoded_tokens: tokens that a step generates in its part ``decode``.
        disk_format: the format of the checkpoint; without a checkpoint, the reason.
        facts: values reported by stages, by metric field.
        custom_figures: values of quality metrics that are plug-ins, by metric field.
        remarks, notes: the same fields of the record.
        estimates: of a case that is estimated, one for all ranks that are alike.
        exit_code, had_children: for a script, its exit code and whether it waited for child processes.
    """

    pinned: StrictBool
    is_trained: StrictBool = False
    unjudged: str | None = None
    durations_s: Sequence[Seconds] = ()
    waited_s: Sequence[Seconds] | None = None
    passive: Sequence[StrictBool] | None = None
    wait_policy: str | None = None
    slept_s: Sequence[Seconds] | None = None
    losses_nats: Sequence[Number | None] | None = None
    computing_bits: Number | None = None
    tokens_per_step: Number | None = None
    epoch_bytes: Size | None = None
    decoded_tokens: Number | None = None
    corpus: str | None = None
    weights_bytes: Size | None = None
    trained_weights_bytes: Size | None = None
    frozen_weights_bytes: SignedSize | None = None
    modules_bytes: Sequence[ModulesReading] | None = None
    breakdown_bytes: Mapping[str, Mapping[str, SignedSize]] | None = None
    peak_part: str | None = None
    communicated_bytes: Mapping[str, Size] | None = None
    disk_bytes: Size | None = None
    disk_format: str = ""
    quality: QualityReading | None = None
    custom_figures: Mapping[str, CustomFigure] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    notes: Sequence[str] = ()
    estimates: Sequence[RankEstimate] | None = None
    exit_code: Count | None = None
    had_children: StrictBool = False


@dataclass(frozen=True)
class ResultSoFar(Reading):
    """The results so far. A worker sends them again before each stage that may fail; the last message counts."""

    event: ClassVar[str] = "result"
    result: Result


@dataclass(frozen=True)
class EndedBadly(Reading):
    """The job failed: its status, and the phase that it failed in; ``None`` before the first."""

    event: ClassVar[str] = "status"
    status: str
    message: str
    phase: str | None = None


@dataclass(frozen=True)
class AsksForEstimate(Reading):
    """The case comes near the device's memory and has not begun: it asks to be estimated, and started again if it fits.

    Attributes:
        free_bytes: the memory that it may take: on a CPU all ranks together, on a GPU each rank.
        where: the words for that, such as 'free on the GPU'.
    """

    event: ClassVar[str] = "estimate"
    free_bytes: Size
    where: str


@dataclass(frozen=True)
class Done(Reading):
    """The worker has completed its request."""

    event: ClassVar[str] = "done"


@dataclass(frozen=True)
class OptionsRefused(Reading):
    """The options of a model are wrong: the name of the model, and what is wrong."""

    event: ClassVar[str] = "refused"
    name: str
    problem: str


@dataclass(frozen=True)
class Progress(Reading):
    """The progress of a preparation, such as the training of a model."""

    event: ClassVar[str] = "progress"
    done: Count
    total: Count
    what: str


Message: TypeAlias = (
    PhaseBegins | PhaseEnds | MarkEntered | MarkLeft | BaselineTaken | GpuFound | ResultSoFar | EndedBadly
    | AsksForEstimate | Done | OptionsRefused | Progress
)  # fmt: skip

_TYPES: Mapping[str, type[Message]] = {
    each.event: each
    for each in (
        PhaseBegins, PhaseEnds, MarkEntered, MarkLeft, BaselineTaken, GpuFound, ResultSoFar, EndedBadly,
        AsksForEstimate, Done, OptionsRefused, Progress,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Encode a message as a line of JSON."""
    return json.dumps({"event": message.event, **plain(message)}).encode() + b"\n"


@functools.cache
def _adapter(event: str) -> TypeAdapter[Message]:
    return TypeAdapter(_TYPES[event])


def decode(line: bytes) -> Message:
    """Decode and validate the message in a line.

    Raises:
        BrokenMessage: if the line is not a valid message.
    """
    try:
        fields = json.loads(line)
        event = fields.pop("event")
        return _adapter(event).validate_python(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        quoted: Any = one_line(line[:_LONGEST_QUOTE].decode(errors="replace"))
        raise BrokenMessage(f"the worker's pipe carried an invalid message: {quoted}") from None
