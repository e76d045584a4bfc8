"""Messages between the comparing program and the process of a version: a JSON object a line, coded here."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

from pydantic import TypeAdapter, ValidationError

from membench.errors import MembenchError, one_line
from membench.host.code_version import CodeVersion

_LONGEST_QUOTE = 80


class BrokenVersionMessage(MembenchError):
    """A line on the pipe of a version's process is not one of its messages."""


@dataclass(frozen=True)
class Setup:
    """The first message to a version's process.

    Attributes:
        suite: name or path of the suite as this version has it.
        devices: devices in place of the suite's own.
        ids: cases to measure, besides those that they are compared with; ``None``: all.
        output: folder of the run's file.
        root: folder of this version's checkout.
        not_from: folder of the other version's checkout, which must not be imported.
        evaluates: whether quality is judged over held-out text.
    """

    kind: ClassVar[str] = "setup"
    suite: str
    output: str
    root: str
    repeats: int
    code: CodeVersion
    devices: Sequence[str] | None = None
    ids: Sequence[str] | None = None
    not_from: str | None = None
    evaluates: bool = True


@dataclass(frozen=True)
class MeasureCase:
    """Measure a case once."""

    kind: ClassVar[str] = "measure"
    id: str
    repeat: int


@dataclass(frozen=True)
class Ready:
    """The version's run is open; ``path`` is ``None`` if its suite has none of the cases."""

    kind: ClassVar[str] = "ready"
    path: str | None
    ids: Sequence[str]


@dataclass(frozen=True)
class Refused:
    """The version's process cannot do what it was asked to."""

    kind: ClassVar[str] = "refused"
    message: str


@dataclass(frozen=True)
class SessionEvent:
    """An event of the version's session, with the details that ``session.run`` describes."""

    kind: ClassVar[str] = "event"
    event: str
    details: Mapping[str, Any]


VersionMessage: TypeAlias = Setup | MeasureCase | Ready | Refused | SessionEvent

_TYPES: Mapping[str, type[VersionMessage]] = {
    each.kind: each for each in (Setup, MeasureCase, Ready, Refused, SessionEvent)
}


def encode(message: VersionMessage) -> str:
    """Return a message as a line of text."""
    return json.dumps({"kind": message.kind, **asdict(message)}) + "\n"


@functools.cache
def _adapter(kind: str) -> TypeAdapter[VersionMessage]:
    return TypeAdapter(_TYPES[kind])


def decode(line: str) -> VersionMessage:
    """Return the message in a line.

    Raises:
        BrokenVersionMessage: if there is none.
    """
    try:
        fields = json.loads(line)
        return _adapter(fields.pop("kind")).validate_python(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        raise BrokenVersionMessage(f"not a message of a version's process: {one_line(line[:_LONGEST_QUOTE])}") from None
