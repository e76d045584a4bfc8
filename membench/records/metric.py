"""The description of a metric: a row of the table of metrics, or a custom metric of a plug-in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from membench.units import Unit, custom_unit

Dependence = Literal["counted", "live", "footprint", "time"]
"""What the values of a metric depend on, besides the case.

``counted``: not on the machine; these are bytes of storages and files, and results of the model. ``live``: on
instruction sets, threads and page size, which decide which kernels run and how much memory they allocate.
``footprint``: on these, and on the operating system and the driver. ``time``: on everything, processor speed included.
"""

Role = Literal["memory", "time", "rate", "energy", "quality", "size of data"]
"""The aspect of a case that a metric measures."""

Phase = Literal["load", "apply", "store", "warmup", "run", "save"]
"""The phases whose live peaks are metrics, in the order in which a case runs through them."""


@dataclass(frozen=True)
class Loss:
    """How a metric measures the quality loss of a case against the reference.

    Attributes:
        axis: the title of an axis of losses.
        what: the noun for titles of plots.
        chance: the largest difference that counts as noise.
        error_field: the field of the metric that holds the standard error of the difference, if there is one.
    """

    axis: str
    what: Literal["quality", "divergence"] = "quality"
    chance: float = 0.0
    error_field: str | None = None


@dataclass(frozen=True)
class Metric:
    """A metric: its name, its unit, and the properties that tables, comparisons and rules use.

    Attributes:
        name: the name in suites and on the command line.
        field: the key in ``Record.metrics``; ends in the unit's suffix.
        title: the heading of its column.
        meaning: one line of explanation.
        unit: the unit of its values, which also parses and formats them.
        better: the direction of improvement.
        depends_on: what must be alike on two machines for their values to be comparable.
        role: the aspect of a case that it measures.
        in_table: whether the comparison table shows it: always, only if a technique changes it, only if it
            decides how much memory is needed, or only if a technique needs more there than the reference ever does.
        has_ratio: whether the ratio of two cases' values is meaningful.
        has_difference: whether the difference of two cases' values is meaningful.
        same_within: run-to-run variation; a ratio closer to one than this is neither a gain nor a loss.
        tolerance: the default tolerance as a share of the base's value; ``None``: not watched by default.
        signed: whether values may be negative: ``no``; ``in noise``, such as memory above a baseline; ``yes``, and
            then limits may be negative, too.
        peak_of: the phase whose live peak, or a part's live peak, it is.
        timed_in: the phase whose duration it is, or in which it was timed; ``None``: that of the timed steps.
        part: the part of a step (``step``: the whole step) whose live peak or median duration it is or derives from.
        category: the category of the memory breakdown that it counts.
        of_scripts: whether it is measured for a user's script, too.
        keeps_samples: whether a baseline keeps the single measurements besides their median.
        learnt: whether it measures what a model has learned; such a metric has no meaning if data are only read.
        of_reference: the reference's own value, if the metric is a distance from the reference.
        loss: how it measures quality loss; ``None``: it does not.
        gains_by_chance: whether a gain after training is not significant, because the standard error covers the
            sampling of the text and not the randomness of training.
        names_rank: whether a table names the rank whose value it is.
        over_ranks: how it follows from the values of several ranks: ``worst``, the one that decides which device is
            needed and how long a step takes; their ``sum``; or ``any`` rank's that has one, where all are the same.
    """

    name: str
    field: str
    title: str
    meaning: str
    unit: Unit
    better: Literal["lower", "higher"]
    depends_on: Dependence
    role: Role
    in_table: bool | Literal["where it decides", "where it changes", "where it needs more"] = False
    has_ratio: bool = True
    has_difference: bool = True
    same_within: float = 0.005
    tolerance: float | None = None
    signed: Literal["no", "in noise", "yes"] = "no"
    peak_of: Phase | None = None
    timed_in: Phase | None = None
    part: str | None = None
    category: Literal["weights", "optimizer", "activations", "cache", "gradients", "communication"] | None = None
    of_scripts: bool = False
    keeps_samples: bool = False
    learnt: bool = False
    of_reference: float | None = None
    loss: Loss | None = None
    gains_by_chance: bool = False
    names_rank: bool = False
    over_ranks: Literal["worst", "sum", "any"] = "worst"

    def __post_init__(self) -> None:
        if not self.field.endswith(self.unit.suffix):
            raise ValueError(f"metric '{self.name}': its field '{self.field}' must end in '{self.unit.suffix}'")

    @property
    def format(self) -> Callable[[float], str]:
        """Return the function that formats a value."""
        return self.unit.format


_OWN = "own."
_OWN_FIELD = re.compile(r"own\.(?P<name>[a-z][a-z0-9_]*)\.(?P<better>lower|higher)(?:\.(?P<unit>[^\s._]{1,16}))?")


def own_field(name: str, better: str, unit: str = "") -> str:
    """Return the field of a custom metric. It encodes the metric's properties and never equals a built-in field.

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
    """Whether a field belongs to the namespace of custom metrics. The field may be malformed; see ``own_metric``."""
    return field.startswith(_OWN)


def own_metric(field: str) -> Metric | None:
    """Make a custom metric from its field; ``None`` if it is not a valid field of a custom metric."""
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
