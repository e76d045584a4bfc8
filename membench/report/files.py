"""Single pictures as PNG or SVG files, for a paper or a slide: what the page draws, drawn without a browser."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.errors import MembenchError, one_line
from membench.protocol.case import Group
from membench.records.comparison import Comparison
from membench.records.run_file import Run
from membench.report import bars, history, pareto, timeline
from membench.report.drawing import Bars, Cloud, Lines, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDINGS = (".png", ".svg")

_MOST_PANELS = 12
"""In one file: more would be too small to read, or too large to open."""

_REFERENCE = "#767676"
# Those of the light page: told apart from each other by people who see few colours, and seen on white.
_COLOURS = ("#0072b2", "#c95700", "#00855f", "#b9568f", "#9c6f00", "#2b8cc4", "#6b4226")
_SHAPES = "osD^Pvh"
_HATCHES = ("", "//", "\\\\", "xx", "--", "..")
_LONGEST_NAME = 44

Panel = tuple[str, Cloud | Bars | Timeline | Lines]


def draw(runs: Sequence[Run], kind: str, path: Path, estimates: Run | None = None) -> list[Path]:
    """Draw one of ``formats.PICTURES``, a panel for each group (or case, for ``timeline``), into a file.

    What does not fit into one file goes into further ones: 'picture-2.png', 'picture-3.png' and so on.

    Args:
        estimates: estimates of cases of the runs, which ``memory`` draws beside what was measured.

    Returns:
        the files.

    Raises:
        MembenchError: if the file's ending is none that can be drawn, there is nothing to draw, a file cannot be
            written, or the library that draws is not installed.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise MembenchError(f"{path}: a picture's file ends in {' or '.join(_ENDINGS)}")
    panels = list(_panels(runs, kind, estimates))
    if not panels:
        raise MembenchError(f"no record there has what '{kind}' shows")
    pages = [panels[first : first + _MOST_PANELS] for first in range(0, len(panels), _MOST_PANELS)]
    files = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, len(pages) + 1))]
    for file, page in zip(files, pages, strict=True):
        _draw_page(page, file)
    return files


def _draw_page(panels: Sequence[Panel], path: Path) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MembenchError(f"a picture needs {error.name}: pip install 'membench[report]'") from None
    heights = [_height(picture) for _, picture in panels]
    # A name is text, even one with dollar signs in it.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "membench"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of a script that the font lacks: boxes are drawn
        drawing = Figure(figsize=(9, sum(heights)), layout="constrained")
        axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for at, (heading, picture) in zip(axes, panels, strict=True):
            at.set_title(one_line(heading), loc="left", fontsize=10)
            _DRAWN_BY[type(picture)](at, picture)
        try:
            drawing.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise MembenchError(f"{path}: cannot be written: {error.strerror}") from None


def _panels(runs: Sequence[Run], kind: str, estimates: Run | None) -> Iterator[Panel]:
    estimated = None if estimates is None else Comparison(estimates.records)
    if kind == "history":
        for (suite, group), pictures in history.history(runs).items():
            yield from ((f"{suite} · {' · '.join(group)}: {picture.title}", picture) for picture in pictures)
        return
    for run in runs:
        if kind == "timeline":
            found = Comparison(run.records)
            repeats = [len(found.repeats(record.group, record.technique)) for record in run.records]
            drawn = [timeline.timeline(record, of) for record, of in zip(run.records, repeats, strict=True)]
            yield from ((picture.title, picture) for picture in drawn if picture.at_s or picture.spans)
            continue
        found = Comparison(run.records)
        for group in found.groups:
            heading = " · ".join(group)
            match kind:
                case "pareto":
                    cloud = pareto.pareto(found, group)
                    if cloud.points:
                        yield f"{heading}: {cloud.title.lower()}", cloud
                case "memory":
                    drawn_bars = bars.memory(found, group, estimated)
                    yield from ((f"{heading}: {picture.title}", picture) for picture in drawn_bars)
                case _:
                    picture = _STACKS[kind](found, group)
                    if picture:
                        yield f"{heading}: {picture.title.lower()}", picture


_STACKS: Mapping[str, Callable[[Comparison, Group], Bars | None]] = {
    "conversion": bars.conversion,
    "breakdown": bars.breakdown,
    "ranks": bars.ranks,
}


def _height(picture: object) -> float:
    """Inches."""
    if isinstance(picture, Bars):
        thick = 1 if picture.stacked else len(picture.series)
        return 1.2 + len(picture.names) * (0.1 + 0.16 * thick)
    return 3.6 + (len(picture.points) // 4 * 0.18 if isinstance(picture, Cloud) else 0)


def _short(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _round(number: int) -> int:
    """How often all colours were taken before: with another shape, no two look alike."""
    return max(0, number - 1) // 7


def _colour(number: int) -> str:
    return _COLOURS[(number - 1) % len(_COLOURS)] if number else _REFERENCE


def _cloud(at: Axes, picture: Cloud) -> None:
    if picture.lowest:
        at.step(*zip(*picture.lowest, strict=True), where="post", linestyle=":", color="#57606a", zorder=1)
    for number, point in enumerate(picture.points):
        colour = _colour(number)
        at.scatter(
            point.x, point.y, s=30 + 270 * point.speed, label=_short(point.technique), zorder=2, edgecolors=colour,
            facecolors=colour if point.on_front else "none", marker=_SHAPES[_round(number) % len(_SHAPES)],
        )  # fmt: skip
    if picture.ticks:
        at.set_xticks([tick.at for tick in picture.ticks], [tick.text for tick in picture.ticks])
    at.set_xlabel(f"{picture.x_title} (filled: on the front of live peaks while running; larger: faster)")
    at.set_ylabel(picture.y_title)
    at.set_ylim(0, 1.12 * max(point.y for point in picture.points) or 1)
    at.grid(alpha=0.3)
    legend = at.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + len(picture.points) // 20)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([40])


def _bars(at: Axes, picture: Bars) -> None:
    rows, is_alone = range(len(picture.names)), len(picture.series) == 1
    thick = 0.75 if picture.stacked or is_alone else 0.8 / len(picture.series)
    left = [0.0] * len(picture.names)
    for number, one in enumerate(picture.series):
        values = [value or 0.0 for value in one.values]
        shift = 0.0 if picture.stacked or is_alone else (number - (len(picture.series) - 1) / 2) * thick
        look = number if one.look is None else one.look
        colours = [_COLOURS[0] if row else _REFERENCE for row in rows] if is_alone else _COLOURS[look % len(_COLOURS)]
        drawn = at.barh(
            [row + shift for row in rows], values, thick, left=left if picture.stacked else None, color=colours,
            label=one_line(one.name), hatch=None if is_alone else _HATCHES[look % len(_HATCHES)], edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        if picture.stacked:
            left = [before + value for before, value in zip(left, values, strict=True)]
        if is_alone:
            at.bar_label(drawn, one.told, padding=3, fontsize=7)
            lines = [] if picture.estimates is None else list(picture.estimates.values)
            for row, value in enumerate(lines):
                if value is not None:
                    at.plot([value, value], [row - 0.45, row + 0.45], color="black", linewidth=1.5)
            at.set_xlim(0, 1.3 * max(*values, *(value or 0.0 for value in lines), 0.0) or 1)
    at.set_yticks(list(rows), [_short(name) for name in picture.names], fontsize=8)
    at.set_ylim(len(picture.names) - 0.5, -0.5)
    at.set_xlabel(picture.unit)
    at.grid(axis="x", alpha=0.3)
    at.set_axisbelow(True)
    if not is_alone:
        at.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _timeline(at: Axes, picture: Timeline) -> None:
    for number, (name, values) in enumerate(picture.columns.items()):
        known = [(second, value) for second, value in zip(picture.at_s, values, strict=True) if value is not None]
        if known:
            at.plot(*zip(*known, strict=True), label=f"{name}, sampled", color=_COLOURS[number], linewidth=1.2,
                    linestyle=("-", ":", "--")[number % 3])  # fmt: skip
    for is_bound, style, label in ((False, "-", "exact peak of a phase"), (True, ":", "no more than this")):
        spans = [span for span in picture.spans if span.peak is not None and span.is_bound is is_bound]
        for number, span in enumerate(spans):
            at.plot([span.began_s, span.ended_s], [span.peak or 0.0] * 2, color="black", linewidth=2.2, linestyle=style,
                    label="" if number else label)  # fmt: skip
    first, last = _ends(picture)
    for number, span in enumerate(picture.spans):
        at.axvspan(span.began_s, span.ended_s, color="#57606a", alpha=0.05 if number % 2 else 0.13, linewidth=0)
        if span.ended_s - span.began_s > 0.02 * (last - first):
            at.text((span.began_s + span.ended_s) / 2, 0.98, one_line(span.phase), transform=at.get_xaxis_transform(),
                    ha="center", va="top", fontsize=7,
                    rotation=0 if span.ended_s - span.began_s > 0.1 * (last - first) else 90)  # fmt: skip
    at.set_xlabel("seconds from the case's start")
    at.set_ylabel(picture.y_title)
    at.set_ylim(top=at.get_ylim()[1] * 1.2)
    at.legend(fontsize=7, loc="lower right")


def _ends(picture: Timeline) -> tuple[float, float]:
    seconds = [*picture.at_s, *(span.began_s for span in picture.spans), *(span.ended_s for span in picture.spans)]
    return min(seconds), max(seconds)


def _lines(at: Axes, picture: Lines) -> None:
    for number, one in enumerate(picture.series):
        label, dashes = _short(one.name), ("-", "--", ":")[_round(number) % 3]
        for stretch in picture.stretches():
            known = [(run, value) for run in stretch if (value := one.values[run]) is not None]
            if known:
                at.plot(*zip(*known, strict=True), label=label, color=_colour(number),
                        marker=_SHAPES[number % len(_SHAPES)], linestyle=dashes)  # fmt: skip
                label = ""
    for number in picture.breaks:
        at.axvline(number - 0.5, color="#57606a", linestyle="--", linewidth=1)
        at.text(number - 0.5, 0.02, " other machine or versions", transform=at.get_xaxis_transform(), fontsize=6,
                rotation=90, va="bottom", ha="right")  # fmt: skip
    at.set_xticks(range(len(picture.runs)), [one_line(run).replace(" (", "\n(") for run in picture.runs], fontsize=7)
    at.set_xlim(-0.4, len(picture.runs) - 0.6)
    at.set_ylabel(picture.unit)
    at.set_ylim(0, 1.08 * max(value for one in picture.series for value in one.values if value is not None) or 1)
    at.grid(alpha=0.3)
    at.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


_DRAWN_BY: dict[type, Callable[[Axes, Any], None]] = {Cloud: _cloud, Bars: _bars, Timeline: _timeline, Lines: _lines}
