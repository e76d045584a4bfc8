"""Requests to a worker, one type per kind of job, and their encoding."""

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
    """The rank of a worker in its job.

    Attributes:
        device: the device of the rank, as torch names it.
        threads: the number of compute threads.
        blas_threads: the number of threads of numpy's products.
        number: the rank, from 0.
        of: the number of ranks of the job (world size).
        is_one_of_several: whether the job's device was written with a count, even if that is 1.
    """

    device: str
    threads: int
    number: int = 0
    of: int = 1
    blas_threads: int | None = None
    is_one_of_several: bool = False


@dataclass(frozen=True)
class Steps:
    """The number of warm-up steps and the number of timed steps.

    Attributes:
        calm_within_s: how long to wait in all for other processes to leave the cores, and to repeat disturbed steps.
    """

    warmup: int
    measured: int
    calm_within_s: float = 0.0


@dataclass(frozen=True)
class ReferenceLogits:
    """The file of the logits of a group's reference, and whether this case writes it."""

    path: str
    is_written_here: bool


@dataclass(frozen=True)
class Checkouts:
    """The folders of two checkouts: code from ``own`` may be imported, code from ``other`` must not."""

    other: str
    own: str


@dataclass(frozen=True)
class VerifyModels:
    """Request to verify the options of models, by the name of each, before anything is measured."""

    models: Mapping[str, Plugin]
    what: Literal["verify"] = "verify"


@dataclass(frozen=True)
class PrepareModel:
    """Request to prepare a model once, such as by training it."""

    model: Plugin
    what: Literal["prepare"] = "prepare"


@dataclass(frozen=True)
class MeasureCase:
    """Request to measure a case.

    Attributes:
        model_name: the name of the model in the suite; ``model`` is the plug-in it refers to.
        members: the names of the stack's members; ``techniques`` are the plug-ins they refer to.
        metrics: quality metrics that are plug-ins, by metric field.
        checkouts: the code that may be imported, if another commit is measured alternately.
        evaluate_s: how long quality may be judged; 0: not at all, ``None``: over all held-out text.
        asks_for_estimate: whether it ends before the model is built, and asks for an estimate, if its size comes near
            the device's memory.
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
    model_name: str | None = None
    evaluate_s: float | None = None
    asks_for_estimate: bool = False
    what: Literal["case"] = "case"


@dataclass(frozen=True)
class EstimateCase:
    """Request to estimate what a case needs, without running it.

    Attributes:
        device: where the case would run, as written: ``8xcuda``.
        threads: with how many each rank would compute; ``None``: what kernels take beside tensors is not asked.
        extrapolates: whether a deep model's steps are traced with few of its layers alone.
    """

    case: MeasureCase
    device: str
    threads: int | None = None
    extrapolates: bool = False
    what: Literal["estimate"] = "estimate"


@dataclass(frozen=True)
class MeasureFunction:
    """Request to measure calls of a function.

    Attributes:
        pickled: the file with the function, its arguments and its environment, as ``protocol.pickling`` writes it.
        raised: the file for an exception that the function raises.
    """

    pickled: str
    raised: str
    steps: Steps
    what: Literal["function"] = "function"


WorkerRequest: TypeAlias = VerifyModels | PrepareModel | MeasureCase | EstimateCase | MeasureFunction


@dataclass(frozen=True)
class Request:
    """The request to one worker (rank); ``scratch`` is the folder for its files."""

    work: WorkerRequest
    rank: Rank
    scratch: str = ""


def encode(request: Request) -> dict[str, Any]:
    """Encode a request as JSON types."""
    encoded: dict[str, Any] = plain(request)
    return encoded


# Built when the fork server imports this module, which keeps the time and the memory out of workers.
_REQUEST = TypeAdapter(Request)


def decode(encoded: Mapping[str, Any]) -> Request:
    """Decode a request that ``encode`` has encoded.

    Raises:
        ValueError: if it is not a valid request.
    """
    return _REQUEST.validate_python(encoded)


def decode_json(encoded: bytes) -> Request:
    """Decode a request from the text of its JSON."""
    return decode(json.loads(encoded))
