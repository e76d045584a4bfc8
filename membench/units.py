"""Conversion of bytes, seconds and ratios to text and back. Internally, sizes are whole bytes and times are seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

LARGEST_SIZE = 2**63 - 1
SMALLEST_VALUE, LARGEST_VALUE = 1e-100, 1e200
"""The ratio of any two values in this range is a finite number."""

_STEPS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
"""The units in which sizes are written, and the bytes in each."""

_SIZES_READ = {"B": 1} | {
    unit: int(step**power)
    for power, prefix in enumerate("KMGT", 1)
    for step, units in ((1024, (f"{prefix}iB", prefix, prefix.lower(), f"{prefix}iB".lower())),
                        (1000, (f"{prefix}B", f"{prefix}B".lower(), *(["kB"] if prefix == "K" else []))))
    for unit in units
}  # fmt: skip
"""The units in which sizes are read. As for GNU coreutils, GB is 1000^3 bytes; G is 1024^3, as for SLURM and Docker."""

_SECONDS = {"µs": 1e-6, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(µs|us|ms|s|min|h)\s*")


def parse_bytes(text: str) -> int:
    """Parse a size such as '2 GiB', '24G' or '24 GB' into bytes.

    Raises:
        ValueError: if the text is not a valid size; GiB and G are 1024^3 bytes, GB is 1000^3, and so for K, M and T.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _SIZES_READ:
        raise ValueError(
            f"'{text}' is no size; write a number and B, KiB, MiB, GiB or TiB, such as '2 GiB'"
            " (2G is 2 GiB; 2 GB is 2 * 1000^3 bytes)"
        )
    size_bytes = float(match[1]) * _SIZES_READ[match[2]]
    if not math.isfinite(size_bytes):
        raise ValueError(f"'{text}' is more than can be counted")
    return round(size_bytes)


def parse_seconds(text: str) -> float:
    """Parse a duration such as '200 ms', '5 s' or '1.5 min' into seconds.

    Raises:
        ValueError: if the text is not a valid duration; units are µs (or us), ms, s, min and h.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no duration; write a number and µs, ms, s, min or h, such as '200 ms'")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        raise ValueError(f"'{text}' is more than can be counted")
    return seconds


def parse_percent(text: str) -> float:
    """Parse a share such as '1%' or '0.5 %' into percent.

    Raises:
        ValueError: if the text is not a valid share.
    """
    match = _SHARE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is no share; write a number and %, such as '1%'")
    return float(match[1])


def _fixed(value: float, digits: int) -> str:
    """Format a value with about ``digits`` significant digits and no exponent."""
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def byte_unit(size_bytes: float) -> tuple[str, int]:
    """Return the unit in which a size is written, and the bytes in that unit: 1536 -> ('KiB', 1024)."""
    unit = "B"
    for name, step in _STEPS.items():
        if abs(size_bytes) >= step:
            unit = name
    return unit, _STEPS[unit]


def format_bytes(size_bytes: float) -> str:
    """Format a size with four significant digits: 1536 -> '1.500 KiB'."""
    unit, step = byte_unit(size_bytes)
    if unit == "B":
        return f"{size_bytes:.0f} B"
    return f"{_fixed(size_bytes / step, 4)} {unit}"


def format_seconds(seconds: float) -> str:
    """Format a duration with three significant digits, in µs, ms, s or minutes."""
    if seconds < 1e-3:
        return f"{_fixed(seconds * 1e6, 3)} µs"
    if seconds < 1:
        return f"{_fixed(seconds * 1e3, 3)} ms"
    if seconds < 120:
        return f"{_fixed(seconds, 3)} s"
    return f"{seconds / 60:.1f} min"


def format_joules(joules: float) -> str:
    """Format an energy with three significant digits, in J or mJ."""
    return f"{_fixed(joules, 3)} J" if joules >= 1 else f"{_fixed(joules * 1e3, 3)} mJ"


def format_percent(percent: float) -> str:
    """Format a share in percent with two significant digits."""
    return f"{percent:.2g}%" if 0 < abs(percent) < 1 else f"{_fixed(percent, 2)}%"


def format_percent_of_all(percent: float) -> str:
    """Format a share that is often close to 100%, with two decimals: 99.87%."""
    return f"{percent:.2f}%"


def format_difference(difference: float) -> str:
    """Format a signed difference with four decimals: '+0.0012'."""
    return f"{round(difference, 4) + 0.0:+.4f}"  # no negative zero


def format_divergence(nats: float) -> str:
    """Format a divergence, which spans many orders of magnitude: '1.3e-05'."""
    return f"{nats:.1e}"


def format_number(number: float) -> str:
    """Format a number without a unit, with four significant digits and no exponent."""
    return _fixed(number, 4) if math.isfinite(number) else str(number)


def format_ratio(ratio: float) -> str:
    """Format a ratio to the reference: 0.5 -> '×0.50'.

    Ratios near one have three decimals; ratios below 0.1 have two significant digits.
    """
    if 0.9 < ratio < 1.1:
        return f"×{ratio:.3f}"
    if 0 < ratio < 0.1:
        return f"×{ratio:.2g}" if ratio >= 1e-4 else f"×{ratio:.1e}"
    return f"×{_fixed(ratio, 3)}"


@dataclass(frozen=True)
class Unit:
    """The unit of a metric: the suffix of its fields, how amounts are parsed and how they are printed.

    Attributes:
        suffix: the end of the name of every metric field in this unit.
        expected: a description of a valid amount, for error messages.
        format: formats an amount as text.
        symbol: the unit's name in services that keep benchmark histories; empty: they get the metric's title.
        counts: the dimension of the unit, for arithmetic with other values.
        parse: parses text with a unit; ``None``: only bare numbers are accepted.
        largest: the largest value that a measurement can have.
    """

    suffix: str
    expected: str
    format: Callable[[float], str]
    symbol: str = ""
    counts: Literal["bytes", "seconds", "per second", "other"] = "other"
    parse: Callable[[str], float] | None = None
    largest: float = LARGEST_VALUE

    def amount(self, value: Any) -> float:
        """Parse an amount such as '2 GiB', '200 ms' or 0.5. Sizes must have a unit; durations may have one.

        Raises:
            ValueError: if the value is not an amount of this unit.
            OverflowError: if the amount is too large for a float.
        """
        if isinstance(value, str) and self.parse is not None:
            return self.parse(value)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or self.counts == "bytes" or not math.isfinite(value):
            raise ValueError
        return float(value)

    def axis(self, highest: float) -> tuple[str, float]:
        """Return the name and the size of the unit for an axis that ends at ``highest``: ``('ms', 0.001)``."""
        if self.counts == "bytes":
            return byte_unit(highest)
        if self.counts == "seconds":
            return ("s", 1.0) if highest >= 1 else ("ms", 1e-3)
        return self.symbol, 1.0


def _number_of(unit: str) -> str:
    return f"a bare number of {unit}"


_PLAIN = "a bare number, without a unit"

BYTES = Unit(
    "_bytes",
    "a size in B, KiB, MiB, GiB or TiB, such as '2 GiB'",
    format_bytes,
    "bytes",
    "bytes",
    parse_bytes,
    LARGEST_SIZE,
)
SECONDS = Unit(
    "_s",
    "a duration in µs, ms, s, min or h, such as '200 ms'; a bare number is seconds",
    format_seconds,
    "s",
    "seconds",
    parse_seconds,
)
TOKENS_PER_SECOND = Unit("tokens_per_s", _number_of("tokens a second"), format_number, "1/s", "per second")
MEGABYTES_PER_SECOND = Unit("_mb_per_s", _PLAIN, format_number, "1/s", "per second")
PERCENT = Unit("_percent", _number_of("percent"), format_percent, "%")
PERCENT_OF_ALL = replace(PERCENT, format=format_percent_of_all)
NATS = Unit("_nats", _number_of("nats a token"), format_number, "nats")
NATS_APART = replace(NATS, format=format_divergence)
BITS_PER_BYTE = Unit("bits_per_byte", _number_of("bits per byte"), format_number)
BITS_PER_BYTE_LOST = replace(BITS_PER_BYTE, format=format_difference)
BITS_PER_BYTE_ERROR = replace(BITS_PER_BYTE, suffix="bits_per_byte_standard_error")
PER_TOKEN = Unit("_per_token", _PLAIN, format_number)
RATIO = Unit("_ratio", _PLAIN, format_number)
JOULES = Unit("_j", _number_of("joules"), format_joules, "J")


def custom_unit(name: str) -> Unit:
    """Make the unit of a custom metric.

    Args:
        name: the plug-in's name for the unit; may be empty.
    """
    gap = "" if name in ("", "%") else " "
    return Unit(name, _PLAIN, lambda value: f"{format_number(value)}{gap}{name}", name)
