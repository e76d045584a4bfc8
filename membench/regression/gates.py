"""Rules that a suite states about its figures: ``peak_live <= 0.6 * reference``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from membench.record import Record


@dataclass(frozen=True)
class Gate:
    """A rule and the cases that it holds for.

    ``text`` is the rule as it was written. ``match``: a shell pattern over case ids.
    """

    text: str
    match: str = "*"


@dataclass(frozen=True)
class Outcome:
    """A gate held against a case.

    Attributes:
        holds: ``None`` where a figure is not known; ``reason`` says which and why.
        left, right: what the two sides came to, as text with units.
    """

    case_id: str
    gate: Gate
    holds: bool | None
    left: str | None = None
    right: str | None = None
    reason: str | None = None

    def sentence(self) -> str:
        """'m/int8/forward/cpu: peak_live <= 0.6 * reference is broken: 202.8 MiB is over 164.8 MiB'."""
        raise NotImplementedError


def parse(text: str, match: str = "*") -> Gate:
    """A rule: two sums of products of numbers with units, metrics and ``reference``, and <=, <, >= or > between.

    A metric's name is that of the case; ``reference`` is the first metric of the rule in the reference case, and
    ``reference.weights`` any other of it.

    Raises:
        RuleError: in one line, with the column.
    """
    raise NotImplementedError


def of_table(table: Mapping[str, Any]) -> tuple[Gate, ...]:
    """A suite's ``[gate]`` table: ``rules``, and ``[[gate.case]]`` tables of ``match`` and ``rules``.

    Raises:
        RuleError: naming key, rule and column.
    """
    raise NotImplementedError


def outcomes(gates: Sequence[Gate], records: Sequence[Record]) -> list[Outcome]:
    """Hold every gate against every case that its pattern fits, but the reference against itself."""
    raise NotImplementedError
