"""What is known of a metric beside its figures: one row of the table of metrics, or one of a plug-in's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from membench.units import Unit, custom_unit

Dependence = Literal["counted", "live", "footprint", "time"]
"""On what a figure depends.

``counted``: on no machine; bytes of storages and files, and what a model computes. ``live``: on instructions, threads
and page size, which decide which kernels run and how much they allocate for themselves. ``footprint``: on these, and on
the operating system and the driver. ``time``: on processor speed, and so on everything.
"""

Role = Literal["memory", "time", "rate", "energy", "quality", "size of data"]
"""What a metric tells about a case."""

Phase = Literal["load", "apply", "store", "warmup", "run"]
"""A phase whose live peak is a metric, in the order in which a case goes through them."""


@dataclass(frozen=True)
class Loss:
    """How a metric tells what quality a case has lost against the reference.

    Attributes:
        axis: the title of an axis of losses.
        what: what is lost, for the title of a picture.
        chance: a difference as small as this may be chance.
        error_field: the metric that is the standard error of the difference, if one is.
    """

    axis: str
    what: Literal["quality", "divergence"] = "quality"
    chance: float = 0.0
    error_field: str | None = None


@dataclass(frozen=True)
class Metric:
    """One metric: its name, its unit, and all that tables, comparisons and rules need to know of it.

    Attributes:
        name: how suites and people write it.
        field: its key in ``Record.metrics``; ends in the unit's suffix.
        title: the heading of its column.
        meaning: one line of explanation.
        unit: of its figures; says how they are read and printed, too.
        better: the direction that is a gain.
        depends_on: what must be alike on two machines for their figures to be compared.
        role: what it tells about a case.
        in_table: whether the comparison shows it: always, only where a technique changes it, or only where it decides
            what memory is needed, too.
        has_ratio: whether a ratio to another case's figure has a meaning.
        has_difference: whether a difference to another case's figure has one.
        same_within: how near to one a ratio is neither a gain nor a loss, because runs of the same case differ by as
            much.
        tolerance: the share of the base's figure by which it may get worse where nobody says otherwise; ``None``: it
            is not watched unless somebody asks for it.
        signed: whether figures may be below zero: ``no``; ``in noise``, as of memory above a baseline; ``yes``, so
            that a limit may be, too.
        peak_of: the phase whose live peak it is, or that of one of its parts.
        part: the part of a step (``step``: all of it) whose live peak it is, or whose median duration it is or follows
            from.
        category: which category of the memory breakdown it counts.
        of_scripts: whether a user's script has it, as cases do.
        keeps_samples: whether a baseline keeps the single measurements, and not only their median.
        learnt: whether it is a figure of what a module has learnt, and has no meaning where data are only read.
        of_reference: the reference's own figure, where the metric is a distance from the reference.
        loss: how it tells the quality that a case loses; ``None``: it does not.
        gains_by_chance: whether a gain in a training proves nothing, because the standard error is of the text and not
            of the training.
    """

    name: str
    field: str
    title: str
    meaning: str
    unit: Unit
    better: Literal["lower", "higher"]
    depends_on: Dependence
    role: Role
    in_table: bool | Literal["where it decides", "where it changes"] = False
    has_ratio: bool = True
    has_difference: bool = True
    same_within: float = 0.005
    tolerance: float | None = None
    signed: Literal["no", "in noise", "yes"] = "no"
    peak_of: Phase | None = None
    part: str | None = None
    category: Literal["weights", "optimizer", "activations", "cache"] | None = None
    of_scripts: bool = False
    keeps_samples: bool = False
    learnt: bool = False
    of_reference: float | None = None
    loss: Loss | None = None
    gains_by_chance: bool = False

    def __post_init__(self) -> None:
        if not self.field.endswith(self.unit.suffix):
            raise ValueError(f"metric '{self.name}': its field '{self.field}' must end in '{self.unit.suffix}'")

    @property
    def format(self) -> Callable[[float], str]:
        """Prints a figure."""
        return self.unit.format


_OWN = "own."
_OWN_FIELD = re.compile(r"own\.(?P<name>[a-z][a-z0-9_]*)\.(?P<better>lower|higher)(?:\.(?P<unit>[^\s._]{1,16}))?")


def own_field(name: str, better: str, unit: str = "") -> str:
    """The field of a plug-in's metric. It says all that a view needs, and is never the field of a built-in one.

    Raises:
        ValueError: if the name or the unit cannot be part of a field.
    """
    field = ".".join(filter(None, ("own", name, better, unit)))
    if _OWN_FIELD.fullmatch(field) is None or not field.isprintable():
        raise ValueError(
            "a metric's name has small letters, digits and '_', and its unit 16 characters at most, none of them a"
            " space, '.' or '_'"
        )
    return field


def is_own(field: str) -> bool:
    """Whether a field is in the name space of plug-ins' metrics; ``own_metric`` says whether it is well formed."""
    return field.startswith(_OWN)


def own_metric(field: str) -> Metric | None:
    """The row of a plug-in's metric, made from its field; ``None`` if the field is not one of a plug-in's."""
    parts = _OWN_FIELD.fullmatch(field)
    if parts is None:
        return None
    return Metric(
        parts["name"],
        field,
        parts["name"].replace("_", " "),
        "as its plug-in measures it",
        custom_unit(parts["unit"] or ""),
        "lower" if parts["better"] == "lower" else "higher",
        depends_on="counted",
        role="quality",
        in_table=True,
        has_ratio=False,
        signed="yes",
        learnt=True,
    )
