"""Sizes and durations that compare with text."""

from __future__ import annotations

import pytest

from membench.pytest_plugin.readable import ByteSize, Duration


def test_a_size_compares_with_what_people_write() -> None:
    size = ByteSize(64 * 2**20)
    assert size < "64.1 MiB"
    assert size <= "64 MiB"
    assert size == "64 MiB"
    assert size != "64 KiB"
    assert size > "63 MiB"
    assert size >= "65536 KiB"
    assert size < "1 GiB"
    assert not size < "64 MiB"


def test_a_size_is_still_a_number_and_reads_like_a_size() -> None:
    size = ByteSize(1536)
    assert size - 512 == 1024
    assert size < 2000.5
    assert hash(size) == hash(1536)
    assert (repr(size), str(size)) == ("1.500 KiB", "1.500 KiB")


def test_a_duration_does_the_same_with_its_units() -> None:
    duration = Duration(0.02)
    assert "19 ms" < duration < "0.021 s"
    assert repr(duration) == "20.0 ms"


@pytest.mark.parametrize("text", ["64 Mb", "64", "much"])
def test_what_is_no_size_is_an_error_and_not_simply_larger(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write a number and B, KiB, MiB, GiB or TiB"):
        assert ByteSize(1) < text
