"""What a worker is asked to do: one request for each kind of job, encoded and decoded here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter

from membench.protocol.case import Plugin
from membench.protocol.readings import plain


@dataclass(frozen=True)
class Rank:
    """Which of a job's processes a worker is.

    Attributes:
        device: its own, as torch names it.
        threads: that it may compute with.
    """

    device: str
    threads: int
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Steps:
    """How many steps are timed, and how many run before them."""

    warmup: int
    measured: int


@dataclass(frozen=True)
class ReferenceLogits:
    """Where the logits of a group's reference are kept, and whether this case is the one that writes them."""

    path: str
    is_written_here: bool


@dataclass(frozen=True)
class Checkouts:
    """Two versions of the code that is measured, by their folders: ``own`` may be imported, ``other`` must not be."""

    other: str
    own: str


@dataclass(frozen=True)
class PrepareModel:
    """Let a model do what it does once, such as training."""

    model: Plugin
    what: Literal["prepare"] = "prepare"


@dataclass(frozen=True)
class MeasureCase:
    """Measure a case.

    Attributes:
        members: of the stack, as the suite wrote them; ``techniques`` are what they stand for.
        metrics: quality metrics that are plug-ins, by field.
        checkouts: which code may be imported, where another commit's is measured in turn.
    """

    model: Plugin
    techniques: Sequence[Plugin]
    members: Sequence[str]
    workload: Plugin
    seed: int
    steps: Steps
    reference: ReferenceLogits
    metrics: Mapping[str, Plugin] = field(default_factory=dict)
    checkouts: Checkouts | None = None
    what: Literal["case"] = "case"


@dataclass(frozen=True)
class MeasureFunction:
    """Measure calls of a function.

    Attributes:
        pickled: the file of function, arguments and surroundings, as ``protocol.pickling`` writes it.
        raised: the file for an exception that the function raises.
    """

    pickled: str
    raised: str
    steps: Steps
    what: Literal["function"] = "function"


WorkerRequest: TypeAlias = PrepareModel | MeasureCase | MeasureFunction


@dataclass(frozen=True)
class Request:
    """What one worker (rank) is asked to do; ``scratch`` is the folder for its files."""

    work: WorkerRequest
    rank: Rank
    scratch: str = ""


def encode(request: Request) -> dict[str, Any]:
    """A request as JSON has it."""
    encoded: dict[str, Any] = plain(request)
    return encoded


# Made when the fork server imports this, so that no worker has to.
_REQUEST = TypeAdapter(Request)


def decode(encoded: Mapping[str, Any]) -> Request:
    """The request in what ``encode`` made of it."""
    return _REQUEST.validate_python(encoded)


def decode_json(encoded: bytes) -> Request:
    """The same of its text."""
    return decode(json.loads(encoded))
