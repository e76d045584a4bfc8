"""The loop that measures suspects again, on made-up measurements: a list of figures of which the median is judged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from membench.comparing import suspects
from membench.regression.verdict import Judgement


def _confirm(first: float, again: float) -> tuple[list[float], Judgement, list[Any]]:
    """Confirm a figure that may be 10 at most, and is so much when it is measured again."""
    calls: list[Any] = []

    def judge(figures: list[float]) -> Judgement:
        calls.append("judge")
        is_worse = statistics.median(figures) > 10
        return cast(Judgement, SimpleNamespace(suspects=("a/none/train/cpu",) if is_worse else ()))

    def measure_again(figures: list[float], ids: Sequence[str], repeats: int) -> list[float]:
        calls.append((*ids, repeats))
        return [*figures, *([again] * repeats)]

    figures, judgement = suspects.confirm([first], judge, measure_again)
    return figures, judgement, calls


def test_what_is_not_worse_is_measured_once() -> None:
    figures, judgement, calls = _confirm(10, 99)
    assert (figures, judgement.suspects, calls) == ([10], (), ["judge"])


def test_a_suspect_that_is_fine_when_measured_again_is_cleared() -> None:
    figures, judgement, calls = _confirm(11, 9)
    assert (figures, judgement.suspects) == ([11, 9, 9, 9], ())
    assert calls == ["judge", ("a/none/train/cpu", 3), "judge"]


def test_a_suspect_that_stays_worse_is_measured_again_no_more() -> None:
    figures, judgement, calls = _confirm(11, 12)
    assert (figures, judgement.suspects) == ([11, 12, 12, 12], ("a/none/train/cpu",))
    assert calls == ["judge", ("a/none/train/cpu", 3), "judge"]
