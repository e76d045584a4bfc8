"""Tolerances: how much worse a metric may get, by default, by a suite or by the command line."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from membench.errors import RuleError, UnknownMetric, did_you_mean
from membench.records.metric import Metric
from membench.records.metrics import METRICS, metrics_by_name
from membench.records.validation import shown

Origin = Literal["default", "suite", "command line"]

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*")
_OFF = "off"
_EVERY = "*"


@dataclass(frozen=True)
class Tolerance:
    """The amount by which a metric may get worse in the cases that a pattern matches.

    Attributes:
        metric: the metric.
        amount: a share of the base's value (0.02 for '2%'), or an amount in the unit of ``metric.field``; infinite for
            'off'.
        is_relative: whether the amount is a share.
        match: a shell pattern for case ids; ``*`` matches slashes, too.
        origin: where it comes from; for each metric, the command line overrides the suite, and the suite the default.
    """

    metric: Metric
    amount: float
    is_relative: bool
    match: str = _EVERY
    origin: Origin = "default"

    def allowed(self, base: float) -> float:
        """Return the amount by which the metric may get worse than ``base``, in its unit."""
        return self.amount * abs(base) if self.is_relative else self.amount

    @property
    def shown(self) -> str:
        """Return the amount as text: '2%', '16.00 MiB', 'off'."""
        if math.isinf(self.amount):
            return _OFF
        return f"{self.amount * 100:.4g}%" if self.is_relative else self.metric.format(self.amount)

    def __str__(self) -> str:
        """Return the tolerance as on the command line: ``peak_live:2%``."""
        return f"{'' if self.match == _EVERY else f'{self.match}:'}{self.metric.name}:{self.shown}"


DEFAULTS: tuple[Tolerance, ...] = tuple(
    Tolerance(metric, metric.tolerance, is_relative=True) for metric in METRICS if metric.tolerance is not None
)
"""The metrics that are watched by default."""


def parse_fail(text: str, own: Sequence[Metric] = ()) -> Tolerance:
    """Parse a value of ``--fail``, such as ``peak_live:2%``, ``peak_live:16MiB``, ``llama-*:time:10%`` or ``time:off``.

    Args:
        own: the custom metrics.

    Raises:
        UnknownMetric: if the metric is unknown; in one line, with the closest known name.
        RuleError: if the value is invalid; in one line, with what is valid.
    """
    # Split from the right, since a case id on 'cuda:0' contains a colon, too.
    parts = [part.strip() for part in text.rsplit(":", 2)]
    if len(parts) < 2 or not all(parts):
        raise RuleError(f"--fail {shown(text)}: write METRIC:AMOUNT or PATTERN:METRIC:AMOUNT, such as 'peak_live:2%'")
    *match, name, value = parts
    try:
        return _tolerance(name, value, match[0] if match else _EVERY, "command line", own)
    except RuleError as error:
        raise type(error)(f"--fail {shown(text)}: {error}") from None


def of_table(table: Mapping[str, Any], own: Sequence[Metric] = ()) -> tuple[Tolerance, ...]:
    """Parse a suite's ``[regression]`` table.

    It has metrics with one amount or a list of amounts, and ``[[regression.case]]`` tables of the same with a
    ``match``.

    Args:
        own: the suite's custom metrics.

    Raises:
        RuleError: if the table is invalid: key and value.
    """
    found = list(_of_metrics("regression", {key: value for key, value in table.items() if key != "case"}, _EVERY, own))
    cases = table.get("case", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise RuleError(f"regression.case = {shown(cases)}: expected tables, each under [[regression.case]]")
    for number, case in enumerate(cases):
        where = f"regression.case.{number}"
        match = case.get("match")
        if not isinstance(match, str) or not match:
            raise RuleError(f"{where}.match: expected a pattern over case ids, such as 'llama-*/train/*'")
        found += _of_metrics(where, {key: value for key, value in case.items() if key != "match"}, match, own)
    return tuple(found)


def _of_metrics(where: str, table: Mapping[str, Any], match: str, own: Sequence[Metric]) -> Iterable[Tolerance]:
    for name, amounts in table.items():
        for value in amounts if isinstance(amounts, list) else [amounts]:
            try:
                yield _tolerance(name, value, match, "suite", own)
            except RuleError as error:
                raise RuleError(f"{where}.{name} = {shown(value)}: {error}") from None


def _tolerance(name: str, value: Any, match: str, origin: Origin, own: Sequence[Metric]) -> Tolerance:
    named = metrics_by_name(own)
    metric = named.get(name)
    if metric is None:
        raise UnknownMetric(f"no metric is named {shown(name)}; {did_you_mean(name, named)}")
    text = value if isinstance(value, str) else ""
    if text.strip() == _OFF:
        return Tolerance(metric, math.inf, is_relative=True, match=match, origin=origin)
    if share := _SHARE.fullmatch(text):
        if not metric.has_ratio:
            raise RuleError(f"a share of it has no meaning; write {metric.unit.expected}")
        return Tolerance(metric, float(share[1]) / 100, is_relative=True, match=match, origin=origin)
    number = _NUMBER.fullmatch(text)
    try:
        absolute = metric.unit.amount(float(number[1]) if number else value)
    except (ValueError, OverflowError):
        percent = "a share such as '2%', or " if metric.has_ratio else ""
        raise RuleError(f"write {percent}{metric.unit.expected}, or 'off'") from None
    if absolute < 0:
        raise RuleError("how much worse it may get must not be negative")
    return Tolerance(metric, absolute, is_relative=False, match=match, origin=origin)


class Tolerances:
    """The tolerances in effect: those of the command line, of a suite, and the defaults."""

    def __init__(self, suite: Sequence[Tolerance] = (), command_line: Sequence[Tolerance] = ()) -> None:
        self._by_precedence = (tuple(command_line), tuple(suite), DEFAULTS)

    def of(self, case_id: str, metric: Metric) -> tuple[Tolerance, ...]:
        """Return the tolerances for a metric of a case: it fails if it exceeds one of them. Empty: it is not watched.

        The first of command line, suite and defaults that has tolerances for the metric counts. There, tolerances with
        a pattern override those for all cases, and the last matching pattern overrides the others.
        """
        for tolerances in self._by_precedence:
            fitting = [one for one in tolerances if one.metric is metric and fnmatch.fnmatchcase(case_id, one.match)]
            if fitting:
                narrow = [one.match for one in fitting if one.match != _EVERY]
                match = narrow[-1] if narrow else _EVERY
                return tuple(one for one in fitting if one.match == match and not math.isinf(one.amount))
        return ()

    def refuse_unmatched(self, case_ids: Iterable[str]) -> None:
        """Refuse tolerances whose pattern matches no case, since they would never be checked.

        Raises:
            RuleError: if there is one; the message names the first.
        """
        ids = list(case_ids)
        for one in (*self._by_precedence[0], *self._by_precedence[1]):
            if not any(fnmatch.fnmatchcase(case_id, one.match) for case_id in ids):
                raise RuleError(f"tolerance {shown(str(one))} fits no case; {did_you_mean(one.match, ids)}")
