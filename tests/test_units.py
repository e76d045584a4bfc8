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
