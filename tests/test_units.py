"""Sizes to text and back."""

from __future__ import annotations

import dataclasses

import pytest

import membench
from membench import units
from membench.pytest_plugin.readable import ByteSize
from membench.suite import gates
from membench.suite.tolerances import parse_fail

from .made_up import record


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.500 KiB"), (64 * 2**20, "64.00 MiB"), (3 * 2**30, "3.000 GiB")],
)
def test_a_size_is_printed_and_read_back(size_bytes: int, text: str) -> None:
    assert units.format_bytes(size_bytes) == text
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GB", 24 * 10**9), ("24 GB", 24 * 10**9), ("24gb", 24 * 10**9), ("1.5 kB", 1500), ("1 KB", 1000),
        ("24G", 24 * 2**30), ("24 G", 24 * 2**30), ("24g", 24 * 2**30), ("24GiB", 24 * 2**30), ("512m", 512 * 2**20),
        ("2T", 2 * 2**40), ("2 TB", 2 * 10**12), ("7 B", 7),
    ],
)  # fmt: skip
def test_decimal_and_binary_units_are_read_as_other_tools_of_linux_do(text: str, size_bytes: int) -> None:
    assert units.parse_bytes(text) == size_bytes


def test_sizes_are_read_alike_wherever_they_are_written() -> None:
    for text, size_bytes in (("24GB", 24 * 10**9), ("24 GB", 24 * 10**9), ("24G", 24 * 2**30), ("24 GiB", 24 * 2**30)):
        assert ByteSize(size_bytes) == text
        assert parse_fail(f"peak_live:{text}").amount == size_bytes
        suite = membench.Suite("s", script={"module": "this"}, limits={"peak_footprint": text})
        assert suite.limits == {"peak_footprint_bytes": size_bytes}
        made = record("none", peak_live_bytes=size_bytes)
        over = dataclasses.replace(made, metrics={"peak_live_bytes": size_bytes + 1})
        assert [gates.outcomes([gates.parse(f"peak_live <= {text}")], [one])[0].holds for one in (made, over)] == [
            True, False,
        ]  # fmt: skip


@pytest.mark.parametrize("text", ["24", "24 Gb", "24 Gi", "24 Bytes", "-2 GB", "2 GB GB", "24 E"])
def test_what_is_no_size_is_refused_and_the_message_tells_the_two_kinds_of_unit_apart(text: str) -> None:
    with pytest.raises(ValueError, match=r"2G is 2 GiB; 2 GB is 2 \* 1000\^3 bytes"):
        units.parse_bytes(text)


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
