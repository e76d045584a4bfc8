"""What a worker says to the runner, a line of JSON a message, encoded and decoded here.

Boundaries of phases are acknowledged by the runner; nothing else is answered.
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
    Reading,
    Seconds,
    SignedSize,
    Size,
    plain,
)

ACKNOWLEDGED = b"go\n"
"""The runner's answer at a boundary of a phase."""

_LONGEST_QUOTE = 80


class BrokenMessage(MembenchError):
    """What came over a worker's pipe is not what a worker says."""


@dataclass(frozen=True)
class PhaseBegins(Reading):
    """A phase of a worker begins once the runner has acknowledged it."""

    event: ClassVar[str] = "begin"
    phase: str


@dataclass(frozen=True)
class PhaseEnds(Reading):
    """A phase has ended: what the worker's own meter read."""

    event: ClassVar[str] = "end"
    reading: PhaseReading


@dataclass(frozen=True)
class MarkEntered(Reading):
    """A user's program enters a phase that it marks."""

    event: ClassVar[str] = "enter"
    phase: str


@dataclass(frozen=True)
class MarkLeft(Reading):
    """A user's program leaves a phase; ``raised`` is the kind of exception that took it out."""

    event: ClassVar[str] = "leave"
    phase: str
    raised: str | None = None


@dataclass(frozen=True)
class BaselineTaken(Reading):
    """The worker is ready: figures count from here."""

    event: ClassVar[str] = "baseline"
    baseline: Baseline


@dataclass(frozen=True)
class GpuFound(Reading):
    """Which GPU the worker runs on, so that the runner can find it in NVML, where devices have another order."""

    event: ClassVar[str] = "device"
    gpu: GpuReading


@dataclass(frozen=True)
class Fact(Reading):
    """A figure that a stage found out, and how it was obtained."""

    value: Number
    source: str


@dataclass(frozen=True)
class CustomFigure(Reading):
    """The value of a plug-in's quality metric, or the reason why it is not known."""

    value: Number | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result(Reading):
    """What a worker knows in the end besides its phases.

    Attributes:
        pinned: whether the C library's allocator could be pinned, so that resident memory is live memory.
        is_trained: whether the model's held-out loss means something.
        tokens_per_step: in a step, padding left out; ``None``: its steps have no tokens.
        epoch_bytes: packed bytes that a step reads, where a step reads an epoch.
        decoded_tokens: new tokens of a step's part ``decode``.
        disk_format: what wrote the checkpoint; where there is none, why not.
        facts: by metric field, what a stage found out.
        custom_figures: by metric field, of quality metrics that are plug-ins.
        remarks, notes: as the record has them.
        exit_code, had_children: of a script: how it ended by itself, and whether it waited for children.
    """

    pinned: StrictBool
    is_trained: StrictBool = False
    durations_s: Sequence[Seconds] = ()
    waited_s: Sequence[Seconds] | None = None
    losses_nats: Sequence[Number | None] | None = None
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
    disk_bytes: Size | None = None
    disk_format: str = ""
    quality: QualityReading | None = None
    custom_figures: Mapping[str, CustomFigure] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    notes: Sequence[str] = ()
    exit_code: Count | None = None
    had_children: StrictBool = False


@dataclass(frozen=True)
class ResultSoFar(Reading):
    """What is known by now; said again before whatever may still fail, and the last one counts."""

    event: ClassVar[str] = "result"
    result: Result


@dataclass(frozen=True)
class EndedBadly(Reading):
    """The job did not go through: its status, and in which phase if that is not the current one."""

    event: ClassVar[str] = "status"
    status: str
    message: str
    phase: str | None = None


@dataclass(frozen=True)
class Done(Reading):
    """All that was asked for is done."""

    event: ClassVar[str] = "done"


@dataclass(frozen=True)
class Progress(Reading):
    """How far something is that is done once, such as the training of a model."""

    event: ClassVar[str] = "progress"
    done: Count
    total: Count
    what: str


Message: TypeAlias = (
    PhaseBegins | PhaseEnds | MarkEntered | MarkLeft | BaselineTaken | GpuFound | ResultSoFar | EndedBadly | Done
    | Progress
)  # fmt: skip

_TYPES: Mapping[str, type[Message]] = {
    each.event: each
    for each in (
        PhaseBegins, PhaseEnds, MarkEntered, MarkLeft, BaselineTaken, GpuFound, ResultSoFar, EndedBadly, Done, Progress,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """A message as a line of text."""
    return json.dumps({"event": message.event, **plain(message)}).encode() + b"\n"


@functools.cache
def _adapter(event: str) -> TypeAdapter[Message]:
    return TypeAdapter(_TYPES[event])


def decode(line: bytes) -> Message:
    """The message in a line, checked.

    Raises:
        BrokenMessage: if it is none.
    """
    try:
        said = json.loads(line)
        event = said.pop("event")
        return _adapter(event).validate_python(said)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        quoted: Any = one_line(line[:_LONGEST_QUOTE].decode(errors="replace"))
        raise BrokenMessage(f"what came over the worker's pipe is no message of a worker: {quoted}") from None
