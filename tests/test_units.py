"""Sizes to text and back."""

from __future__ import annotations

import pytest

from membench import units


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.500 KiB"), (64 * 2**20, "64.00 MiB"), (3 * 2**30, "3.000 GiB")],
)
def test_a_size_is_printed_and_read_back(size_bytes: int, text: str) -> None:
    assert units.format_bytes(size_bytes) == text
    assert units.parse_bytes(text) == size_bytes


def test_a_decimal_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="KiB, MiB, GiB"):
        units.parse_bytes("2 GB")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("200 ms", 0.2), ("5 s", 5), ("5s", 5), ("1.5 min", 90), ("2 h", 7200), ("30 µs", 30e-6), ("30 us", 30e-6)],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert units.parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("seconds", [4.2e-5, 0.123, 7.25, 150.0])
def test_a_printed_duration_is_read_back(seconds: float) -> None:
    assert units.parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=0.005)


@pytest.mark.parametrize("text", ["5", "-5 s", "5 sec", "five s", "1e3 s", ""])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration; write a number and µs, ms, s, min or h"):
        units.parse_seconds(text)


def test_amounts_beyond_all_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="more than can be counted"):
        units.parse_bytes("9" * 400 + " GiB")
    with pytest.raises(ValueError, match="more than can be counted"):
        units.parse_seconds("9" * 400 + " s")
