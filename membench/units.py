"""Bytes, seconds and ratios to text and back. Inside, sizes are whole bytes and times are seconds."""

from __future__ import annotations

import math
import re

_STEPS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"µs": 1e-6, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(µs|us|ms|s|min|h)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as '2 GiB' or '512 MiB'.

    Raises:
        ValueError: if the text is no size; units are B, KiB, MiB, GiB and TiB (1024-based).
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no size; write a number and B, KiB, MiB, GiB or TiB, such as '2 GiB'")
    size_bytes = float(match[1]) * _STEPS[match[2]]
    if not math.isfinite(size_bytes):
        raise ValueError(f"'{text}' is more than can be counted")
    return round(size_bytes)


def parse_seconds(text: str) -> float:
    """Seconds in a duration such as '200 ms', '5 s' or '1.5 min'.

    Raises:
        ValueError: if the text is no duration; units are µs (or us), ms, s, min and h.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no duration; write a number and µs, ms, s, min or h, such as '200 ms'")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        raise ValueError(f"'{text}' is more than can be counted")
    return seconds


def parse_percent(text: str) -> float:
    """Percent in a share such as '1%' or '0.5 %'.

    Raises:
        ValueError: if the text is no share.
    """
    match = _SHARE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no share; write a number and %, such as '1%'")
    return float(match[1])


def _fixed(value: float, digits: int) -> str:
    """``value`` with about so many significant digits and no exponent."""
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def byte_unit(size_bytes: float) -> tuple[str, int]:
    """The unit in which a size is written, and its bytes: 1536 -> ('KiB', 1024)."""
    unit = "B"
    for name, step in _STEPS.items():
        if abs(size_bytes) >= step:
            unit = name
    return unit, _STEPS[unit]


def format_bytes(size_bytes: float) -> str:
    """A size with four significant digits: 1536 -> '1.500 KiB'."""
    unit, step = byte_unit(size_bytes)
    if unit == "B":
        return f"{size_bytes:.0f} B"
    return f"{_fixed(size_bytes / step, 4)} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration with three significant digits, in µs, ms, s or minutes."""
    if seconds < 1e-3:
        return f"{_fixed(seconds * 1e6, 3)} µs"
    if seconds < 1:
        return f"{_fixed(seconds * 1e3, 3)} ms"
    if seconds < 120:
        return f"{_fixed(seconds, 3)} s"
    return f"{seconds / 60:.1f} min"


def format_joules(joules: float) -> str:
    """Energy with three significant digits, in J or mJ."""
    return f"{_fixed(joules, 3)} J" if joules >= 1 else f"{_fixed(joules * 1e3, 3)} mJ"


def format_percent(percent: float) -> str:
    """A share in percent with two significant digits."""
    return f"{percent:.2g}%" if 0 < abs(percent) < 1 else f"{_fixed(percent, 2)}%"


def format_percent_of_all(percent: float) -> str:
    """A share of a whole that is often near it: 99.87%."""
    return f"{percent:.2f}%"


def format_difference(difference: float) -> str:
    """A signed difference to four decimals: '+0.0012'."""
    return f"{round(difference, 4) + 0.0:+.4f}"  # no negative zero


def format_divergence(nats: float) -> str:
    """A divergence, over many orders of magnitude: '1.3e-05'."""
    return f"{nats:.1e}"


def format_number(number: float) -> str:
    """A number without a unit, with four significant digits and no exponent."""
    return _fixed(number, 4) if math.isfinite(number) else str(number)


def format_ratio(ratio: float) -> str:
    """A ratio to the reference: 0.5 -> '×0.50'; near one with a digit more, and small ones with two that count."""
    if 0.9 < ratio < 1.1:
        return f"×{ratio:.3f}"
    if 0 < ratio < 0.1:
        return f"×{ratio:.2g}" if ratio >= 1e-4 else f"×{ratio:.1e}"
    return f"×{_fixed(ratio, 3)}"
