"""Options of the marker ``@pytest.mark.membench(...)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from membench.errors import MembenchError, did_you_mean
from membench.host.device import Device
from membench.suite.tolerances import DEFAULTS, Tolerance, of_table
from membench.units import BYTES, parse_bytes

FIXTURE = "membench"

_MOST_REPEATS = 100
_ONE_DEVICE = "write cpu, cuda or cuda:0"


@dataclass(frozen=True)
class MarkerOptions:
    """The combined options of the markers of a test, its class and its module; the nearest takes precedence.

    Attributes:
        limit_bytes: the limit of the live peak of a measured function.
        tolerances: the accepted increase compared with a baseline.
        device: the device to measure on: ``cpu``, ``cuda`` or ``cuda:0``.
        repeats: the number of measurements, each in a separate process.
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
        raise ValueError(_ONE_DEVICE)
    if Device.parse(value).in_ranks:
        raise ValueError(f"a function runs on one device: {_ONE_DEVICE}")
    return value


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


def options_of(item: pytest.Item) -> MarkerOptions:
    """Return the options of a test's markers.

    Raises:
        MembenchError: if a key is unknown or a value is invalid.
    """
    found: dict[str, Any] = {}
    for mark in item.iter_markers(FIXTURE):  # nearest first
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
    return MarkerOptions(**found)


def check(item: pytest.Item) -> None:
    """Fail a test whose marker is wrong, or that has a marker but does not use the fixture."""
    try:
        options_of(item)
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
