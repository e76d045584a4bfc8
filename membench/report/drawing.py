"""What pictures are made of: points, bars and lines, each with a caption and a table that say the same in words.

Whatever draws them (a page in a browser, a file of its own) adds colours and nothing else. Positions are in the unit
that the picture names; ``None`` is not known and not drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Table = tuple[tuple[str, ...], ...]
"""Rows of text, the titles of the columns first."""


class Point(NamedTuple):
    technique: str
    x: float
    y: float
    speed: float
    """Of a step, as a share of the fastest one's."""
    on_front: bool
    told: str


class Tick(NamedTuple):
    at: float
    text: str


@dataclass(frozen=True)
class Cloud:
    """Memory against quality or time. ``lowest`` joins the points that no other is to the left of and below."""

    title: str
    caption: str
    x_title: str
    y_title: str
    ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    lowest: tuple[tuple[float, float], ...]
    table: Table


class Series(NamedTuple):
    """Values of one name; ``look``: which colour and pattern, where it has the same in every picture."""

    name: str
    values: tuple[float | None, ...]
    told: tuple[str, ...]
    look: int | None = None


class Estimates(NamedTuple):
    """What each bar of a picture was estimated to be, drawn as a line across it."""

    values: tuple[float | None, ...]
    told: tuple[str, ...]


@dataclass(frozen=True)
class Bars:
    """A bar for each name and series; ``stacked`` ones make up a whole."""

    title: str
    caption: str
    unit: str
    names: tuple[str, ...]
    series: tuple[Series, ...]
    stacked: bool
    table: Table
    estimates: Estimates | None = None
    """Of bars of a single series."""


class Span(NamedTuple):
    """A phase, with its peak where one was measured: exact, or a bound."""

    phase: str
    allocator: str
    began_s: float
    ended_s: float
    peak: float | None
    is_bound: bool
    told: str


@dataclass(frozen=True)
class Timeline:
    title: str
    caption: str
    unit: str
    y_title: str
    at_s: tuple[float, ...]
    columns: Mapping[str, tuple[float | None, ...]]
    spans: tuple[Span, ...]
    table: Table


@dataclass(frozen=True)
class Lines:
    """One metric of a group over several runs; no line goes from a run to the next across one of ``breaks``."""

    title: str
    caption: str
    unit: str
    runs: tuple[str, ...]
    breaks: tuple[int, ...]
    """The numbers of the runs that were on another machine, or with other versions, than the run before."""
    series: tuple[Series, ...]
    table: Table

    def stretches(self) -> Iterator[range]:
        """The numbers of the runs that a line may join."""
        ends = (0, *self.breaks, len(self.runs))
        return (range(first, last) for first, last in itertools.pairwise(ends))


_MOST_LISTED = 8


def listed(names: Sequence[str]) -> str:
    """Names in a row; of many, the first few and how many more there are."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
