"""Where a change comes from: phase, part of the step, category, modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from membench.records.metric import Metric
from membench.records.metrics import METRICS
from membench.regression.measured import MeasuredCase, Modules

_WORTH_TELLING = 0.1
"""Of the whole change: what is less is left out, unless nothing is more."""

_NUMBER_IN_NAME = re.compile(r"(?<![^.])\d+(?![^.])")
_TIME_OF_PART = {
    metric.part: metric.field
    for metric in METRICS
    if metric.role == "time" and metric.part is not None and metric.part != "step"
}
_WORDS = {"optimizer": "optimizer state", "cache": "key-value cache", "other": "temporaries and buffers of libraries"}


@dataclass(frozen=True)
class Cause:
    """A share of a change.

    Attributes:
        amount: in the metric's unit, signed.
        what: a category (``weights``, ``gradients``, ``optimizer``, ``activations``, ``cache``, ``other``), ``held``
            (what is neither, and stays when the work is done), ``meanwhile`` (what is gone then), the names of modules,
            or for time a part of the step.
        kind: what ``what`` names.
        phase: in which it shows, if it is known; ``part`` of the step likewise.
    """

    amount: float
    what: str
    kind: Literal["category", "modules", "part of the step"]
    phase: str | None = None
    part: str | None = None

    @property
    def words(self) -> str:
        """``what``, to be read: 'optimizer state (phase run, part optimizer)'."""
        where = [f"phase {self.phase}"] if self.phase else []
        where += [f"part {self.part}"] if self.part else []
        if self.kind == "modules":
            return f"weights of {self.what}"
        if self.what == "held":
            named = "memory besides the weights that stays"
        elif self.what == "meanwhile":
            named = "memory that is taken meanwhile and given back"
        else:
            named = _WORDS.get(self.what, self.what) if self.kind == "category" else self.what
        return f"{named} ({', '.join(where)})" if where else named


def causes(metric: Metric, base: MeasuredCase, new: MeasuredCase) -> tuple[Cause, ...]:
    """What a metric's change is made of, the largest share first; empty where the records do not tell.

    Categories say what holds memory at the highest moment; where they are not known (no training, no cache) it is told
    apart into weights, what else stays, and what a step takes meanwhile.
    """
    before, now = base.value(metric.field), new.value(metric.field)
    if before is None or now is None:
        return ()
    return _worth_telling(_all_causes(metric, base, new), now - before)


def _all_causes(metric: Metric, base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    if metric.category is not None:
        return _modules(base, new) if metric.category == "weights" else _category(metric.category, base, new)
    if metric.peak_of is not None and metric.part is not None:
        return _at_the_peak(base, new, metric.part, metric.part)
    if metric.peak_of == "run":
        return _at_the_peak(base, new, base.peak_part, new.peak_part) or _of_a_step(base, new)
    if metric.peak_of is not None:
        return _phase(metric.peak_of, base, new)
    if metric.field == "held_live_bytes":
        return _held(base, new)
    if metric.part == "step" or metric.field == "step_p95_s":  # the slowest steps have the same parts
        return _parts_of_a_step(base, new, in_seconds=metric.role == "time")
    return []


def _worth_telling(found: Iterable[Cause], change: float) -> tuple[Cause, ...]:
    """Those that go the way of the change, largest first."""
    same_way = sorted((cause for cause in found if cause.amount * change > 0), key=lambda cause: -abs(cause.amount))
    large = [cause for cause in same_way if abs(cause.amount) >= _WORTH_TELLING * abs(change)]
    return tuple(large or same_way[:1])


def _difference(field: str, base: MeasuredCase, new: MeasuredCase) -> float | None:
    before, now = base.value(field), new.value(field)
    return None if before is None or now is None else now - before


def _modules(base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    """By the names of layers, numbers left open: one that is gone or new counts, too."""
    if base.modules is None or new.modules is None:
        return []
    before, now = _by_pattern(base.modules), _by_pattern(new.modules)
    found = []
    for pattern in now | before:
        size_before, size_now = (sum(group.bytes for group in side.get(pattern, ())) for side in (before, now))
        if size_now != size_before:
            found.append(Cause(size_now - size_before, _named(before, now, pattern), "modules"))
    return found


def _by_pattern(modules: Sequence[Modules]) -> dict[str, list[Modules]]:
    found: dict[str, list[Modules]] = {}
    for group in modules:
        found.setdefault(_NUMBER_IN_NAME.sub("*", group.modules), []).append(group)
    return found


def _named(before: Mapping[str, list[Modules]], now: Mapping[str, list[Modules]], pattern: str) -> str:
    """Which layers of a pattern differ: those of a size that none had before, or all where there are more or fewer."""
    sizes = {group.bytes // group.count for group in before.get(pattern, ())}
    changed = [group for group in now.get(pattern, ()) if group.bytes // group.count not in sizes]
    named = [f"{group.modules} ({group.count} of them)" if group.count > 1 else group.modules for group in changed]
    if named:
        return ", ".join(named)
    names = [group.modules for group in (*now.get(pattern, ()), *before.get(pattern, ()))]
    count_before, count_now = (sum(group.count for group in side.get(pattern, ())) for side in (before, now))
    return f"{names[0]} ({count_now} of them, before {count_before})"


def _category(category: str, base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    """A category's growth, in the part of the step that holds most of it."""

    def most(case: MeasuredCase) -> tuple[int, str | None]:
        sizes = [(of_part[category], part) for part, of_part in case.breakdown_bytes.items() if category in of_part]
        return max(sizes, default=(0, None), key=lambda size: size[0])

    (before, _), (now, part) = most(base), most(new)
    if category == "optimizer":
        part = "optimizer"  # which makes the states, wherever they are seen
    return [Cause(now - before, category, "category", "run", part)] if now != before else []


def _at_the_peak(base: MeasuredCase, new: MeasuredCase, part_base: str | None, part_new: str | None) -> list[Cause]:
    """What holds memory at the highest moment, by category."""
    before = base.breakdown_bytes.get(part_base or "")
    now = new.breakdown_bytes.get(part_new or "")
    if before is None or now is None:
        return []
    found = [
        Cause(now.get(category, 0) - before.get(category, 0), category, "category", "run", part_new)
        for category in {**now, **before}
    ]
    return [cause for cause in found if cause.amount]


def _of_a_step(base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    peak, held = (_difference(field, base, new) for field in ("peak_live_bytes", "held_live_bytes"))
    if peak is None or held is None:
        return []
    return [*_held(base, new), Cause(peak - held, "meanwhile", "category", "run")]


def _held(base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    held, weights = (_difference(field, base, new) for field in ("held_live_bytes", "weights_bytes"))
    if held is None or weights is None:
        return []
    rest = held - weights
    states = _difference("optimizer_state_bytes", base, new) or 0
    if abs(rest - states) > abs(rest):  # they are kept elsewhere
        states = 0
    return [
        *_weights(weights, base, new, "run"),
        Cause(states, "optimizer", "category", "run"),
        Cause(rest - states, "held", "category", "run"),
    ]


def _weights(change: float, base: MeasuredCase, new: MeasuredCase, phase: str) -> list[Cause]:
    return _modules(base, new) or ([Cause(change, "weights", "category", phase)] if change else [])


def _phase(phase: str, base: MeasuredCase, new: MeasuredCase) -> list[Cause]:
    """Of loading and converting: weights, what else is left when it is done, and what was taken only meanwhile."""
    before, now = base.phases.get(phase), new.phases.get(phase)
    if before is None or now is None:
        return []
    held = now["held_live_bytes"] - before["held_live_bytes"]
    peak = now["peak_live_bytes"] - before["peak_live_bytes"]
    meanwhile = Cause(peak - held, "meanwhile", "category", phase)
    weights = _difference("weights_bytes", base, new) or 0
    if abs(held - weights) < _WORTH_TELLING * abs(held):
        return [*_weights(weights, base, new, phase), Cause(held - weights, "held", "category", phase), meanwhile]
    # Before or while they are converted, weights take more than they do in the end.
    return [Cause(held, "weights" if weights * held > 0 else "held", "category", phase), meanwhile]


def _parts_of_a_step(base: MeasuredCase, new: MeasuredCase, in_seconds: bool) -> list[Cause]:
    """The parts of a step whose median duration changed; of tokens a second they go the other way."""
    found = {
        part: change for part, field in _TIME_OF_PART.items() if (change := _difference(field, base, new)) is not None
    }
    whole = _difference("step_median_s", base, new)
    if "prefill" in found and whole is not None:
        found["decode"] = whole - found["prefill"]
    return [
        Cause(change if in_seconds else -change, part, "part of the step", "time") for part, change in found.items()
    ]
