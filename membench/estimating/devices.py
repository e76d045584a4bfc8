"""Devices by name, and how much of their memory a process can use: the table ``devices.toml``, read."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

from membench.errors import SuiteError, did_you_mean
from membench.units import parse_bytes

_GIB = 2**30
_MOST_DEVICES = 1_000_000
_COUNT = re.compile(r"(\d+)\s*[x×*]\s*(?=[A-Za-z])(.+)", re.IGNORECASE)
_SIZE_AT_THE_END = re.compile(r"-\d+GB$")


@dataclass(frozen=True)
class Card:
    """A device as the table knows it.

    Attributes:
        kind: 'data-centre', 'workstation', 'consumer' or 'unified' (memory that is shared with the processor).
        label: the size that it is sold with, such as '80 GB'.
        usable_bytes: what torch, or for Apple Metal, reports as its memory.
        overhead_bytes: what one process takes of it besides torch's allocations: its context, without NCCL's buffers.
        source: the address at which the usable memory is reported.
    """

    name: str
    vendor: str
    kind: str
    label: str
    usable_bytes: int
    overhead_bytes: int
    source: str


@dataclass(frozen=True)
class Budget:
    """The memory of a number of equal devices.

    Attributes:
        name: of one device, or the size that was given for it.
        count: how many there are, each with a process of its own.
        usable_bytes: the memory of one device.
        overhead_bytes: what a process takes of a device besides torch's allocations; 0 if a size was given.
        torch_device: what torch calls such a device; AMD's are 'cuda', too. Estimates are made as for 'cuda' for all.
        source: the address at which the usable memory is reported; ``None``: the size is the user's.
    """

    name: str
    count: int
    usable_bytes: int
    overhead_bytes: int
    torch_device: Literal["cuda", "mps"]
    source: str | None

    @property
    def per_device_bytes(self) -> int:
        """What is left for torch's allocations on each device."""
        return self.usable_bytes - self.overhead_bytes


@functools.cache
def _table() -> tuple[Mapping[str, Card], int]:
    """Return the cards by name, and NCCL's buffers in bytes."""
    table = tomllib.loads((files("membench.estimating") / "devices.toml").read_text(encoding="utf-8"))
    overhead = table.pop("overhead")
    found = {}
    for name, entry in table.items():
        # Apple's figure is what the system recommends to use at most, nothing is taken off it.
        context_gib = 0 if entry["vendor"] == "Apple" else overhead["cuda_context_gib"]
        found[name] = Card(
            name,
            entry["vendor"],
            entry["kind"],
            entry["label"],
            round(entry["usable_gib"] * _GIB),
            round(context_gib * _GIB),
            entry["source"],
        )
    return MappingProxyType(found), round(overhead["nccl_gib"] * _GIB)


def cards() -> Mapping[str, Card]:
    """Return all known devices by name."""
    return _table()[0]


def parse(text: str) -> Budget:
    """Parse devices such as '8xH100-80GB', 'RTX-4090' or 'rtx 4090'; case, spaces, hyphens and underscores are alike.

    Raises:
        SuiteError: if no device has the name, or several sizes of it exist, or the number of devices is none.
    """
    match = _COUNT.fullmatch(text.strip())
    count, name = (_count(match[1], text), match[2]) if match else (1, text)
    card = _card(name)
    apple = card.vendor == "Apple"
    if apple and count > 1:
        raise SuiteError(f"'{text}': torch cannot share work between Apple's devices; write '{card.name}'")
    buffers_bytes = _table()[1] if count > 1 else 0
    return Budget(
        card.name,
        count,
        card.usable_bytes,
        card.overhead_bytes + buffers_bytes,
        "mps" if apple else "cuda",
        card.source,
    )


def of_memory(text: str, count: int = 1) -> Budget:
    """Parse the memory of one device, such as '24GB' or '24 GiB', all of which can be used.

    Raises:
        SuiteError: if the text is not a size, or is none, or the number of devices is none.
    """
    try:
        usable_bytes = parse_bytes(text)
    except ValueError as error:
        raise SuiteError(str(error)) from None
    if usable_bytes == 0:
        raise SuiteError(f"'{text}': a device has some memory")
    return Budget(text.strip(), _count(str(count), text), usable_bytes, 0, "cuda", None)


def _count(digits: str, text: str) -> int:
    # Python refuses to convert very many digits.
    if not digits.isdecimal() or len(digits) > len(str(_MOST_DEVICES)) or not 1 <= int(digits) <= _MOST_DEVICES:
        raise SuiteError(f"'{text}': the number of devices is from 1 to {_MOST_DEVICES}")
    return int(digits)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def _card(name: str) -> Card:
    by_plain_name = {_plain(f"{card.name} {card.label}"): card for card in cards().values()}
    by_plain_name |= {_plain(card.name): card for card in cards().values()}
    asked, written = _plain(name), name.strip()
    if asked in by_plain_name:
        return by_plain_name[asked]
    # A size in a name means that there are others, known or not.
    sizes = [known for known in cards() if _plain(_SIZE_AT_THE_END.sub("", known)) == asked]
    if sizes:
        raise SuiteError(f"'{written}' is sold in several sizes; known: {', '.join(sizes)}; or state its memory")
    raise SuiteError(f"no device '{written}'; {did_you_mean(written, cards())}; or state its memory")
