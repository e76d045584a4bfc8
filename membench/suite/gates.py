"""Gates: rules of a suite about the metrics of its cases, such as ``peak_live <= 0.6 * reference``."""

from __future__ import annotations

import fnmatch
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from membench.errors import RuleError, did_you_mean
from membench.protocol.case import REFERENCE, Group
from membench.records.disturbed_times import SHARED, WHY, are_disturbed, median
from membench.records.judged_text import OTHER_TEXT, are_of_other_text
from membench.records.metric import Metric
from membench.records.metrics import metrics_by_name
from membench.records.references import references_of
from membench.records.validation import shown
from membench.suite.rule_tokens import Token, tokens
from membench.units import format_bytes, format_number, format_seconds, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from membench.records.record import Record  # costs as much to import as all else here

_LONGEST_RULE = 400
_DEEPEST = 20
_REFERENCE = "reference"
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt,
}  # fmt: skip
_WORDS = {"<=": "over", "<": "not under", ">=": "under", ">": "not over"}
_ARITHMETIC: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


class _Dimension(NamedTuple):
    """The dimension of a value, as exponents of bytes and seconds; all other values are bare numbers."""

    bytes: int = 0
    seconds: int = 0

    def __str__(self) -> str:
        names = {(0, 0): "a bare number", (1, 0): "a size", (0, 1): "a duration"}
        return names.get((self.bytes, self.seconds), "neither size, duration nor number")


_NUMBER, _SIZE, _DURATION = _Dimension(), _Dimension(bytes=1), _Dimension(seconds=1)
_DIMENSIONS = {"bytes": _SIZE, "seconds": _DURATION}


class _Unknown(Exception):
    """A value that a rule needs is not known; ``is_unchecked`` as of ``Outcome``."""

    def __init__(self, reason: str, *, is_unchecked: bool = True) -> None:
        super().__init__(reason)
        self.is_unchecked = is_unchecked


class _NotApplicable(Exception):
    """A metric that a rule needs has no meaning for the case."""


_Lookup = Callable[[bool, Metric], float]
"""Returns the value of a metric: of the reference case if the first argument is true, else of the case itself."""


@dataclass(frozen=True)
class _Expression:
    """One side of a rule, or a part of it: a function that computes its value, and its dimension."""

    value: Callable[[_Lookup], float]
    dimension: _Dimension
    uses_reference: bool = False
    metrics: frozenset[str] = frozenset()

    def shown(self, value: float) -> str:
        return {_SIZE: format_bytes, _DURATION: format_seconds}.get(self.dimension, format_number)(value)


@dataclass(frozen=True)
class Gate:
    """A rule and the cases that it applies to; ``parse`` makes one.

    Attributes:
        text: the rule as it was written.
        match: a shell pattern for case ids.
    """

    text: str
    match: str
    left: _Expression = field(repr=False, compare=False)
    comparison: str = field(repr=False, compare=False)
    right: _Expression = field(repr=False, compare=False)

    @property
    def uses_reference(self) -> bool:
        return self.left.uses_reference or self.right.uses_reference

    @property
    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that the rule uses, of the case or of its reference."""
        return self.left.metrics | self.right.metrics


@dataclass(frozen=True)
class Outcome:
    """The result of checking a gate for a case.

    Attributes:
        case_id: the case; the gate's pattern if no case has the metrics of the rule.
        holds: ``None`` if a value is not known; ``reason`` then says which and why.
        left, right: the values of the two sides, as text with units.
        is_unchecked: whether it must not pass for checked: a case was skipped, or a value is not known. A case that
            ended badly fails by itself; what a busy machine did to a time is a warning, since it says nothing of it.
    """

    case_id: str
    gate: Gate
    holds: bool | None
    left: str | None = None
    right: str | None = None
    reason: str | None = None
    is_unchecked: bool = False

    def sentence(self) -> str:
        """Return the result as a sentence.

        'm/int8/forward/cpu: peak_live <= 0.6 * reference is broken: 202.8 MiB is over 164.8 MiB'
        """
        if self.holds is None:
            return f"{self.case_id}: {self.gate.text} was not checked: {self.reason}"
        if self.holds:
            return f"{self.case_id}: {self.gate.text} holds: {self.left} against {self.right}"
        word = _WORDS[self.gate.comparison]
        return f"{self.case_id}: {self.gate.text} is broken: {self.left} is {word} {self.right}"


def parse(text: str, match: str = "*", own: Sequence[Metric] = ()) -> Gate:
    """Parse a rule: two arithmetic expressions of numbers, metrics and ``reference``, compared by <=, <, >= or >.

    The name of a metric stands for its value in the case. ``reference`` stands for the value of the rule's first metric
    in the reference case, and ``reference.weights`` for the value of another metric there. Numbers may have units.

    Args:
        match: a shell pattern for the ids of the cases that the rule applies to.
        own: the suite's custom metrics.

    Raises:
        RuleError: if the rule is invalid; in one line, with the column.
    """
    try:
        if len(text) > _LONGEST_RULE:
            raise RuleError(f"a rule has {_LONGEST_RULE} characters at most")
        return _Parser(text, own).gate(match)
    except RuleError as error:
        raise RuleError(f"rule {shown(text)}{error}") from None


class _Parser:
    """A recursive-descent parser of rules."""

    def __init__(self, text: str, own: Sequence[Metric]) -> None:
        self._text = text
        self._named = metrics_by_name(own)
        self._tokens = list(tokens(text))
        self._at = 0
        self._depth = 0
        self._first = next(
            (self._named[each.text] for each in self._tokens if each.kind == "name" and each.text in self._named), None
        )

    def gate(self, match: str) -> Gate:
        left = self._sum()
        comparison = self._take()
        if comparison.text not in _COMPARISONS:
            raise self._wrong(comparison, "write <=, <, >= or > here")
        right = self._sum()
        if (rest := self._take()).kind != "end":
            raise self._wrong(rest, "the rule should end here")
        if left.dimension != right.dimension:
            raise self._wrong(comparison, f"{left.dimension} stands on its left and {right.dimension} on its right")
        return Gate(self._text, match, left, comparison.text, right)

    def _take(self) -> Token:
        token = self._tokens[self._at]
        self._at += token.kind != "end"
        return token

    def _wrong(self, token: Token, remedy: str) -> RuleError:
        found = f"'{token.text}'" if token.text else "the end"
        return RuleError(f", column {token.column}: {found}: {remedy}")

    def _chain(self, part: Callable[[], _Expression], signs: str) -> _Expression:
        """Parse parts joined by operators of equal precedence, which associate to the left."""
        whole = part()
        while self._tokens[self._at].text in tuple(signs):
            sign = self._take()
            whole = self._joined(whole, sign, part())
        return whole

    def _sum(self) -> _Expression:
        return self._chain(lambda: self._chain(self._factor, "*/"), "+-")

    def _joined(self, first: _Expression, sign: Token, second: _Expression) -> _Expression:
        one, other = first.dimension, second.dimension
        if sign.text in "+-":
            if one != other:
                raise self._wrong(sign, f"{one} and {other} do not add up")
            dimension = one
        else:
            power = 1 if sign.text == "*" else -1
            dimension = _Dimension(one.bytes + power * other.bytes, one.seconds + power * other.seconds)
        operation = _ARITHMETIC[sign.text]
        return _Expression(
            lambda lookup: operation(first.value(lookup), second.value(lookup)),
            dimension,
            first.uses_reference or second.uses_reference,
            first.metrics | second.metrics,
        )

    def _factor(self) -> _Expression:
        token = self._take()
        if token.text == "(":
            self._depth += 1
            if self._depth > _DEEPEST:
                raise self._wrong(token, f"more than {_DEEPEST} brackets within each other")
            inner = self._sum()
            if (closing := self._take()).text != ")":
                raise self._wrong(closing, "')' is missing")
            self._depth -= 1
            return inner
        if token.kind == "number":
            return self._number(token)
        if token.kind == "name":
            return self._metric(token)
        raise self._wrong(token, "expected a number, a metric or 'reference' here")

    def _number(self, token: Token) -> _Expression:
        if not token.unit:
            number, dimension = float(token.text), _NUMBER
        elif token.unit == "%":
            raise self._wrong(token, f"write {float(token.text) / 100:g} for a share of {token.text}%")
        else:
            number, dimension = self._with_unit(token)
        return _Expression(lambda _: number, dimension)

    def _with_unit(self, token: Token) -> tuple[float, _Dimension]:
        written = f"{token.text} {token.unit}"
        for parsed, dimension in ((parse_bytes, _SIZE), (parse_seconds, _DURATION)):
            try:
                return float(parsed(written)), dimension
            except ValueError:
                continue
        raise self._wrong(token, f"unit '{token.unit}' is none of B, KiB, MiB, GiB, TiB, µs, ms, s, min and h")

    def _metric(self, token: Token) -> _Expression:
        whose, _, named = token.text.partition(".")
        if whose == _REFERENCE:
            of_reference, name = True, named
        elif not named:
            of_reference, name = False, whose
        else:
            raise self._wrong(token, f"only 'reference' has figures of its own: {_REFERENCE}.{named}")
        metric = self._named.get(name) if name else self._first
        if metric is None and not name:
            raise self._wrong(token, "of which metric? the rule names none; write reference.peak_live, say")
        if metric is None:
            raise self._wrong(token, f"no metric is named '{name}'; {did_you_mean(name, [*self._named, _REFERENCE])}")
        found = metric
        dimension = _DIMENSIONS.get(metric.unit.counts, _NUMBER)
        return _Expression(lambda lookup: lookup(of_reference, found), dimension, of_reference, frozenset({found.name}))


def of_table(table: Mapping[str, Any], own: Sequence[Metric] = ()) -> tuple[Gate, ...]:
    """Parse a suite's ``[gate]`` table: ``rules``, and ``[[gate.case]]`` tables with ``match`` and ``rules``.

    Args:
        own: the suite's custom metrics.

    Raises:
        RuleError: if the table is invalid: key, rule and column.
    """
    unknown = next((key for key in table if key not in ("rules", "case")), None)
    if unknown is not None:
        raise RuleError(f"unknown key 'gate.{unknown}'; {did_you_mean(unknown, ('rules', 'case'))}")
    found = list(_of_rules("gate", table.get("rules", []), "*", own))
    cases = table.get("case", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise RuleError(f"gate.case = {shown(cases)}: expected tables, each under [[gate.case]]")
    for number, case in enumerate(cases):
        where = f"gate.case.{number}"
        unknown = next((key for key in case if key not in ("match", "rules")), None)
        if unknown is not None:
            raise RuleError(f"unknown key '{where}.{unknown}'; {did_you_mean(unknown, ('match', 'rules'))}")
        match = case.get("match")
        if not isinstance(match, str) or not match:
            raise RuleError(f"{where}.match: expected a pattern over case ids, such as 'llama-*/int8/*'")
        found += _of_rules(where, case.get("rules", []), match, own)
    return tuple(found)


def _of_rules(where: str, rules: Any, match: str, own: Sequence[Metric]) -> Iterator[Gate]:
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise RuleError(f"{where}.rules = {shown(rules)}: expected a list of rules: ['peak_live <= 0.6 * reference']")
    for number, rule in enumerate(rules):
        try:
            yield parse(rule, match, own)
        except RuleError as error:
            raise RuleError(f"{where}.rules.{number}: {error}") from None


def outcomes(gates: Sequence[Gate], records: Sequence[Record]) -> list[Outcome]:
    """Check every gate for every case that its pattern matches.

    A reference is not compared with itself. Cases for which a metric of the rule has no meaning (such as bits per byte
    of an untrained model) are skipped; a gate without any case to check has one outcome that says so.
    """
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record.id, []).append(record)
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    references = references_of(groups)
    found = []
    for gate in gates:
        checked = [
            outcome
            for case_id, repeats in cases.items()
            if fnmatch.fnmatchcase(case_id, gate.match)
            and not (gate.uses_reference and repeats[0].technique == REFERENCE)
            and (outcome := _checked(gate, repeats, references.get(repeats[0].group, []))) is not None
        ]
        found += checked or [_of_no_case(gate, cases)]
    return found


def _of_no_case(gate: Gate, cases: Mapping[str, Sequence[Record]]) -> Outcome:
    fitting = [repeats[0].technique for case_id, repeats in cases.items() if fnmatch.fnmatchcase(case_id, gate.match)]
    if gate.uses_reference and fitting and set(fitting) == {REFERENCE}:
        return Outcome(gate.match, gate, None, reason="only references are here, and nothing to hold against them")
    return Outcome(gate.match, gate, None, reason="no case here has these figures", is_unchecked=True)


def _checked(gate: Gate, repeats: Sequence[Record], reference: Sequence[Record]) -> Outcome | None:
    """Check a gate for one case; ``None`` if a metric of the rule has no meaning for the case."""

    def lookup(of_reference: bool, metric: Metric) -> float:
        if gate.uses_reference and metric.depends_on == "time" and repeats[0].device.shares_cores:
            raise _Unknown(f"{metric.name} of the case says nothing beside the reference's: {SHARED}")
        if gate.uses_reference and are_of_other_text(metric.field, repeats, reference):
            raise _Unknown(f"{metric.name}: {OTHER_TEXT}", is_unchecked=True)
        return _median(reference if of_reference else repeats, metric, "the reference" if of_reference else "the case")

    try:
        left, right = gate.left.value(lookup), gate.right.value(lookup)
    except _NotApplicable:
        return None
    except _Unknown as unknown:
        return Outcome(repeats[0].id, gate, None, reason=str(unknown), is_unchecked=unknown.is_unchecked)
    except ZeroDivisionError:
        return Outcome(repeats[0].id, gate, None, reason="it divides by a figure that is 0", is_unchecked=True)
    except OverflowError:
        left = right = math.inf
    if not (math.isfinite(left) and math.isfinite(right)):
        return Outcome(repeats[0].id, gate, None, reason="it comes to more than a number holds", is_unchecked=True)
    return Outcome(
        repeats[0].id, gate, _COMPARISONS[gate.comparison](left, right), gate.left.shown(left), gate.right.shown(right)
    )


def _median(repeats: Sequence[Record], metric: Metric, whose: str) -> float:
    if not repeats:
        raise _Unknown(f"{whose} was not measured")
    bad = next((record for record in repeats if record.status not in ("ok", "diverged")), None)
    if bad is not None:
        raise _Unknown(f"{whose} ended as {bad.status}", is_unchecked=bad.status == "skipped")
    if are_disturbed(repeats, metric.field):
        raise _Unknown(f"{metric.name} of {whose} says nothing: {WHY}", is_unchecked=False)
    if (value := median(repeats, metric.field)) is not None:
        return value
    if metric.field in repeats[0].metrics:
        reason = repeats[0].reasons.get(metric.field, "no reason is kept")
        raise _Unknown(f"{metric.name} of {whose} is not known: {reason}")
    raise _NotApplicable
