"""What ``@pytest.mark.membench(...)`` asks of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from membench.errors import MembenchError, did_you_mean
from membench.records.names import checked_device
from membench.suite.tolerances import DEFAULTS, Tolerance, of_table
from membench.units import BYTES, parse_bytes

FIXTURE = "membench"

_MOST_REPEATS = 100


@dataclass(frozen=True)
class Demands:
    """What the markers of a test, its class and its module ask for; the nearest one has its way.

    Attributes:
        limit_bytes: how much live memory a measured function may take at most.
        tolerances: how much more than before it may take.
        device: where it is measured: ``cpu``, ``cuda`` or ``cuda:0``.
        repeats: how often it is measured, each time in a process of its own.
    """

    limit_bytes: int | None = None
    tolerances: tuple[Tolerance, ...] = ()
    device: str = "cpu"
    repeats: int = 1


def _limit(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError("write a size with its unit, such as '1 GiB'")
    return parse_bytes(value)


def _compare(value: Any) -> tuple[Tolerance, ...]:
    memory = [one.metric.name for one in DEFAULTS if one.metric.unit is BYTES]
    try:
        return of_table(dict.fromkeys(memory, value))
    except MembenchError:
        raise ValueError("write a share such as '2%', a size such as '16 MiB', or 'off'") from None


def _device(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("write cpu, cuda or cuda:0")
    return checked_device(value)


def _repeats(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_REPEATS:
        raise ValueError(f"write a whole number from 1 to {_MOST_REPEATS}")
    return value


_KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "limit": ("limit_bytes", _limit),
    "compare": ("tolerances", _compare),
    "device": ("device", _device),
    "repeats": ("repeats", _repeats),
}


def demands(item: pytest.Item) -> Demands:
    """What is asked of a test.

    Raises:
        MembenchError: for an unknown key or a value that does not fit, in one line.
    """
    found: dict[str, Any] = {}
    for mark in item.iter_markers(FIXTURE):  # the nearest comes first
        if mark.args:
            raise _wrong(mark, "it takes no values without a name; known: " + ", ".join(_KEYS))
        for key, value in mark.kwargs.items():
            if key not in _KEYS:
                raise _wrong(mark, f"unknown key '{key}'; {did_you_mean(key, _KEYS)}")
            name, checked = _KEYS[key]
            try:
                found.setdefault(name, checked(value))
            except ValueError as error:
                raise _wrong(mark, f"{key} = {value!r}: {error}") from None
    return Demands(**found)


def check(item: pytest.Item) -> None:
    """Fail a test whose own marker is wrong, or would ask for something of nobody."""
    try:
        demands(item)
        is_own = any(mark.name == FIXTURE for mark in item.own_markers)
        if is_own and FIXTURE not in getattr(item, "fixturenames", ()):
            raise MembenchError(
                "@pytest.mark.membench: the test does not use the fixture 'membench', so nothing would be held against"
                " what the marker asks for"
            )
    except MembenchError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _wrong(mark: pytest.Mark, what: str) -> MembenchError:
    written = ", ".join([*map(repr, mark.args), *(f"{key}={value!r}" for key, value in mark.kwargs.items())])
    return MembenchError(f"@pytest.mark.membench({written}): {what}")
