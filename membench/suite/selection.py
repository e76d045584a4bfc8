"""The -k expression, which selects cases: parts of case ids, joined by and, or, not and parentheses."""

from __future__ import annotations

import re
from collections.abc import Callable

from membench.errors import MembenchError, SuiteError

Predicate = Callable[[str], bool]

_DEEPEST = 100


def parse(expression: str) -> Predicate:
    """Parse an expression into a predicate of case ids.

    Raises:
        SuiteError: if the expression is not valid.
    """
    words = re.findall(r"[()]|[^\s()]+", expression)
    position = 0

    def peek() -> str | None:
        return words[position] if position < len(words) else None

    def take() -> str:
        nonlocal position
        word = peek()
        if word is None:
            raise SuiteError(f"-k '{expression}': something is missing at the end")
        position += 1
        return word

    def disjunction(depth: int) -> Predicate:
        choices = [conjunction(depth)]
        while peek() == "or":
            take()
            choices.append(conjunction(depth))
        return lambda id: any(choice(id) for choice in choices)

    def conjunction(depth: int) -> Predicate:
        demands = [term(depth)]
        while peek() == "and":
            take()
            demands.append(term(depth))
        return lambda id: all(demand(id) for demand in demands)

    def term(depth: int) -> Predicate:
        if depth > _DEEPEST:
            raise SuiteError(f"-k: more than {_DEEPEST} brackets and 'not' within each other")
        word = take()
        if word == "not":
            inner = term(depth + 1)
            return lambda id: not inner(id)
        if word == "(":
            inner = disjunction(depth + 1)
            if take() != ")":
                raise SuiteError(f"-k '{expression}': ')' is missing")
            return inner
        if word in ("and", "or", ")"):
            raise SuiteError(f"-k '{expression}': '{word}' stands where a part of an id belongs")
        return lambda id: word in id

    predicate = disjunction(0)
    if peek() is not None:
        raise SuiteError(f"-k '{expression}': '{peek()}' stands where 'and' or 'or' belongs")
    return predicate


def no_case_matches(expression: str) -> MembenchError:
    """Make the error for an expression that matches no case of a suite."""
    return MembenchError(f"-k '{expression}' fits no case; 'membench list SUITE' names them")
