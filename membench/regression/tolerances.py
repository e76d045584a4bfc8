"""How much worse a figure may get: the defaults, what a suite says, what the command line says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from membench.record import Metric

Origin = Literal["default", "suite", "command line"]


@dataclass(frozen=True)
class Tolerance:
    """How much worse one metric may get in the cases that a pattern fits.

    Attributes:
        metric: which, as in ``record.METRICS``.
        amount: a share of the base's figure (0.02 for '2%'), or an amount in the unit of ``metric.field``; infinite
            for 'off'.
        is_relative: which of the two.
        match: a shell pattern over case ids; ``*`` passes over slashes, too.
        origin: who said so; what the command line says of a metric replaces what a suite says of it, and that the
            default.
    """

    metric: Metric
    amount: float
    is_relative: bool
    match: str = "*"
    origin: Origin = "default"

    def allowed(self, base: float) -> float:
        """How much worse than ``base`` the metric may get, in its unit."""
        raise NotImplementedError

    def __str__(self) -> str:
        """As it is written: ``peak_live:2%``."""
        raise NotImplementedError


DEFAULTS: tuple[Tolerance, ...] = ()
"""What fails where nobody says otherwise: memory that repeats within 1 %, and time by more than 10 %."""


def parse_fail(text: str) -> Tolerance:
    """``--fail``: ``peak_live:2%``, ``time:10%``, ``peak_live:16MiB``, ``llama-*:peak_live:2%``, ``time:off``.

    Raises:
        RuleError: in one line, with the nearest right name.
    """
    raise NotImplementedError


def of_table(table: Mapping[str, Any]) -> tuple[Tolerance, ...]:
    """A suite's ``[regression]`` table: metrics with one amount or a list of them, and ``[[regression.case]]`` tables
    of the same with a ``match``.

    Raises:
        RuleError: naming the key and the value.
    """
    raise NotImplementedError


class Tolerances:
    """What is watched, and how closely, out of everything that was said."""

    def __init__(self, suite: Sequence[Tolerance] = (), command_line: Sequence[Tolerance] = ()) -> None:
        raise NotImplementedError

    def of(self, case_id: str, metric: Metric) -> tuple[Tolerance, ...]:
        """The tolerances that hold for a case's metric: it fails if it breaks one of them. Empty: it is not watched."""
        raise NotImplementedError
