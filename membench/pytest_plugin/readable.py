"""Sizes and durations that compare with text: ``peak < "64 MiB"``, ``time < "20 ms"``."""

from __future__ import annotations

from typing import Any

from membench.units import format_bytes, format_seconds, parse_bytes, parse_seconds


class _Readable:
    """Mixin for numbers that compare with text with a unit and are formatted as such text."""

    def _parse(self, text: str) -> float:
        raise NotImplementedError

    def _number(self, other: Any) -> Any:
        return self._parse(other) if isinstance(other, str) else other

    def __lt__(self, other: Any) -> bool:
        return super().__lt__(self._number(other))  # type: ignore[misc, no-any-return]

    def __le__(self, other: Any) -> bool:
        return super().__le__(self._number(other))  # type: ignore[misc, no-any-return]

    def __gt__(self, other: Any) -> bool:
        return super().__gt__(self._number(other))  # type: ignore[misc, no-any-return]

    def __ge__(self, other: Any) -> bool:
        return super().__ge__(self._number(other))  # type: ignore[misc, no-any-return]

    def __eq__(self, other: object) -> bool:
        return super().__eq__(self._number(other))

    def __hash__(self) -> int:
        return super().__hash__()

    def __str__(self) -> str:
        return repr(self)


class ByteSize(_Readable, int):
    """A size in bytes.

    Raises:
        ValueError: on comparison with text that is not a valid size; GiB and G are 1024^3 bytes, GB is 1000^3.
    """

    def _parse(self, text: str) -> int:
        return parse_bytes(text)

    def __repr__(self) -> str:
        return format_bytes(self)


class Duration(_Readable, float):
    """A duration in seconds.

    Raises:
        ValueError: on comparison with text that is not a valid duration; units are µs (or us), ms, s, min and h.
    """

    def _parse(self, text: str) -> float:
        return parse_seconds(text)

    def __repr__(self) -> str:
        return format_seconds(self)
