"""Bytes, seconds and ratios to text and back. Inside, sizes are whole bytes and times are seconds."""

from __future__ import annotations

import re

_STEPS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as '2 GiB' or '512 MiB'.

    Raises:
        ValueError: if the text is no size; units are B, KiB, MiB, GiB and TiB (1024-based).
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no size; write a number and B, KiB, MiB, GiB or TiB, such as '2 GiB'")
    return round(float(match[1]) * _STEPS[match[2]])


def format_bytes(size_bytes: int) -> str:
    """A size with four significant digits: 1536 -> '1.500 KiB'."""
    magnitude = abs(size_bytes)
    unit = "B"
    for name, step in _STEPS.items():
        if magnitude >= step:
            unit = name
    if unit == "B":
        return f"{size_bytes} B"
    value = size_bytes / _STEPS[unit]
    digits = max(0, 3 - len(str(int(abs(value)))) + 1)
    return f"{value:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration with three significant digits, in µs, ms, s or minutes."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min"


def format_ratio(ratio: float) -> str:
    """A ratio to the reference: 0.5 -> '×0.50'."""
    return f"×{ratio:.3f}" if 0.9 < ratio < 1.1 else f"×{ratio:.2f}"
