"""Checks of the numbers that plug-ins return, which a worker sends only if a reader of its record takes them."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any

from membench import plugins
from membench.errors import MembenchError
from membench.protocol.messages import Fact
from membench.records.metric import is_own
from membench.records.metrics import is_possible_value, known_metric
from membench.records.validation import shortened, shown
from membench.units import LARGEST_SIZE, LARGEST_VALUE


class InvalidValue(MembenchError):
    """A plug-in returned a value that no record can hold; the message names the plug-in and the field."""


class Facts(dict[str, tuple[float, str]]):
    """The facts of a case, and the plug-in that each is from.

    Attributes:
        owners: the plug-in that set a fact, by its field, where it is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[Any, plugins.Technique | plugins.Workload | plugins.Model] = {}

    def __setitem__(self, name: str, fact: tuple[float, str]) -> None:
        super().__setitem__(name, fact)
        frame = sys._getframe(1)
        while frame is not None and name not in self.owners:
            owner = frame.f_locals.get("self")
            if isinstance(owner, plugins.Technique | plugins.Workload | plugins.Model):
                self.owners[name] = owner
            frame = frame.f_back  # type: ignore[assignment]

    def update(self, *others: Any, **named: Any) -> None:
        """Set facts one by one, so that the plug-in of each is known."""
        for name, fact in dict(*others, **named).items():
            self[name] = fact


def number(value: object, largest: float = LARGEST_VALUE) -> int | float:
    """Return a number as an int or a float of Python; numbers of numpy are converted.

    Raises:
        InvalidValue: if it is no number, or one that no record can hold.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidValue(f"{shown(value)}: expected a number")
    try:
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    except (OverflowError, ValueError):
        plain = math.inf
    if not abs(plain) <= (LARGEST_SIZE if isinstance(plain, int) else largest):
        raise InvalidValue(f"{shown(value)}: expected a number that is finite and of a possible size")
    return plain


def count(value: object) -> int | float | None:
    """Return a number of tokens as a plug-in reports it; ``None`` if it reports none.

    Raises:
        InvalidValue: if it is not one.
    """
    if value is None:
        return None
    plain = number(value, LARGEST_SIZE)
    if plain < 0:
        raise InvalidValue(f"{shown(value)}: must be at least 0")
    return plain


def loss(value: object) -> float:
    """Return the loss of a step, which need not be finite.

    Raises:
        InvalidValue: if it is no number.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool | numbers.Integral):
        return float(value)
    return float(number(value))


def checked_fact(name: object, fact: object) -> Fact:
    """Return a fact as it is sent.

    Raises:
        InvalidValue: if no record can hold it.
    """
    if not isinstance(name, str) or is_own(name):
        raise InvalidValue("expected the name of a metric")
    if not isinstance(fact, tuple | list) or len(fact) != 2 or not isinstance(fact[1], str):
        raise InvalidValue(f"{shown(fact)}: expected a number and how it was obtained")
    value, metric = number(fact[0]), known_metric(name)
    if not is_possible_value(name, value) or (metric is not None and metric.signed == "no" and value < 0):
        raise InvalidValue(f"{shown(value)}: no figure is of such a size")
    return Fact(value, fact[1])


def field_of(name: object) -> str:
    """Return the name of a fact's field for a message."""
    return shortened(name) if isinstance(name, str) else shown(name)


def owner_of(facts: Mapping[str, Any], name: str) -> Any:
    """Return the plug-in that set a fact; ``None`` if it is not known."""
    return facts.owners.get(name) if isinstance(facts, Facts) else None
