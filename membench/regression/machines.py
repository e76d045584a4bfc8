"""In what two machines differ, and what of the figures that touches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["counted", "live", "footprint", "time"]
"""What a figure hangs on. ``counted``: bytes of storages and files, on no machine. ``live`` and ``footprint``: also on
what decides which kernels run and how. ``time``: on everything."""


@dataclass(frozen=True)
class Difference:
    """One respect in which two machines or their software differ.

    ``bars``: the kinds of figures that cannot be compared for it. Versions bar nothing: what they change is what one
    wants to know.
    """

    respect: str
    base: Any
    new: Any
    bars: frozenset[Kind] = frozenset()

    def __str__(self) -> str:
        """``cores: 2, now 4``."""
        raise NotImplementedError


def differences(base: Mapping[str, Any], new: Mapping[str, Any], on_gpu: bool) -> tuple[Difference, ...]:
    """All that differs between two descriptions of machines."""
    raise NotImplementedError


def kind(field: str) -> Kind:
    """What a metric hangs on."""
    raise NotImplementedError


def machine_class(machine: Mapping[str, Any], on_gpu: bool) -> str:
    """A short name for machines whose timings may be compared: '2-cores-epyc', '1-h100-80gb-hbm3'."""
    raise NotImplementedError
