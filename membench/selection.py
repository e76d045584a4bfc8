"""The -k expression: parts of case ids, joined by and, or, not and brackets."""

from __future__ import annotations

import re
from collections.abc import Callable

from membench.errors import SuiteError

Predicate = Callable[[str], bool]


def parse(expression: str) -> Predicate:
    """A function that says whether a case id is meant.

    Raises:
        SuiteError: if the expression is not one.
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

    def either() -> Predicate:
        left = both()
        while peek() == "or":
            take()
            left = _or(left, both())
        return left

    def both() -> Predicate:
        left = single()
        while peek() == "and":
            take()
            left = _and(left, single())
        return left

    def single() -> Predicate:
        word = take()
        if word == "not":
            inner = single()
            return lambda id: not inner(id)
        if word == "(":
            inner = either()
            if take() != ")":
                raise SuiteError(f"-k '{expression}': ')' is missing")
            return inner
        if word in ("and", "or", ")"):
            raise SuiteError(f"-k '{expression}': '{word}' stands where a part of an id belongs")
        return lambda id: word in id

    predicate = either()
    if peek() is not None:
        raise SuiteError(f"-k '{expression}': '{peek()}' stands where 'and' or 'or' belongs")
    return predicate


def _and(left: Predicate, right: Predicate) -> Predicate:
    return lambda id: left(id) and right(id)


def _or(left: Predicate, right: Predicate) -> Predicate:
    return lambda id: left(id) or right(id)
