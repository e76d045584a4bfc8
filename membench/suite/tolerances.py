"""How much worse a figure may get: the defaults, what a suite says, what the command line says."""

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
    """How much worse one metric may get in the cases that a pattern fits.

    Attributes:
        metric: its row in the table of metrics.
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
    match: str = _EVERY
    origin: Origin = "default"

    def allowed(self, base: float) -> float:
        """How much worse than ``base`` the metric may get, in its unit."""
        return self.amount * abs(base) if self.is_relative else self.amount

    @property
    def shown(self) -> str:
        """The amount as people write it: '2%', '16.00 MiB', 'off'."""
        if math.isinf(self.amount):
            return _OFF
        return f"{self.amount * 100:.4g}%" if self.is_relative else self.metric.format(self.amount)

    def __str__(self) -> str:
        """As it is written: ``peak_live:2%``."""
        return f"{'' if self.match == _EVERY else f'{self.match}:'}{self.metric.name}:{self.shown}"


DEFAULTS: tuple[Tolerance, ...] = tuple(
    Tolerance(metric, metric.tolerance, is_relative=True) for metric in METRICS if metric.tolerance is not None
)
"""What is watched where nobody says otherwise."""


def parse_fail(text: str, own: Sequence[Metric] = ()) -> Tolerance:
    """``--fail``: ``peak_live:2%``, ``time:10%``, ``peak_live:16MiB``, ``llama-*:peak_live:2%``, ``time:off``.

    Args:
        own: metrics of plug-ins, which may be named, too.

    Raises:
        UnknownMetric: in one line, with the nearest right name.
        RuleError: in one line, with what would be right.
    """
    # From the right, since the id of a case on 'cuda:0' has a colon, too.
    parts = [part.strip() for part in text.rsplit(":", 2)]
    if len(parts) < 2 or not all(parts):
        raise RuleError(f"--fail {shown(text)}: write METRIC:AMOUNT or PATTERN:METRIC:AMOUNT, such as 'peak_live:2%'")
    *match, name, value = parts
    try:
        return _tolerance(name, value, match[0] if match else _EVERY, "command line", own)
    except RuleError as error:
        raise type(error)(f"--fail {shown(text)}: {error}") from None


def of_table(table: Mapping[str, Any], own: Sequence[Metric] = ()) -> tuple[Tolerance, ...]:
    """A suite's ``[regression]`` table: metrics with one amount or a list of them, and ``[[regression.case]]`` tables
    of the same with a ``match``.

    Raises:
        RuleError: naming the key and the value.
    """
    found = list(_of_metrics("regression", {key: value for key, value in table.items() if key != "case"}, _EVERY, own))
    cases = table.get("case", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise RuleError(f"regression.case = {shown(cases)}: tables are wanted, each under [[regression.case]]")
    for number, case in enumerate(cases):
        where = f"regression.case.{number}"
        match = case.get("match")
        if not isinstance(match, str) or not match:
            raise RuleError(f"{where}.match: a pattern over case ids is wanted, such as 'llama-*/train/*'")
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
    """What is watched, and how closely, out of everything that was said."""

    def __init__(self, suite: Sequence[Tolerance] = (), command_line: Sequence[Tolerance] = ()) -> None:
        self._said = (tuple(command_line), tuple(suite), DEFAULTS)

    def of(self, case_id: str, metric: Metric) -> tuple[Tolerance, ...]:
        """The tolerances that hold for a case's metric: it fails if it breaks one of them. Empty: it is not watched.

        Of the command line, the suite and the defaults the first that names the metric counts. In it, patterns come
        before what is said of every case, and of several patterns that fit the last one.
        """
        for said in self._said:
            fitting = [one for one in said if one.metric is metric and fnmatch.fnmatchcase(case_id, one.match)]
            if fitting:
                narrow = [one.match for one in fitting if one.match != _EVERY]
                match = narrow[-1] if narrow else _EVERY
                return tuple(one for one in fitting if one.match == match and not math.isinf(one.amount))
        return ()

    def refuse_idle(self, case_ids: Iterable[str]) -> None:
        """A pattern that fits no case watches nothing.

        Raises:
            RuleError: naming the first such pattern.
        """
        ids = list(case_ids)
        for one in (*self._said[0], *self._said[1]):
            if not any(fnmatch.fnmatchcase(case_id, one.match) for case_id in ids):
                raise RuleError(f"tolerance {shown(str(one))} fits no case; {did_you_mean(one.match, ids)}")
