"""Two measurements of the same cases to a verdict on each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from membench.record import Metric
from membench.regression.attribution import Cause
from membench.regression.machines import Difference
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.noise import Noise
from membench.regression.tolerances import Tolerance, Tolerances

Verdict = Literal["regressed", "better", "same", "undecided", "not judged"]
"""``undecided``: worse than is tolerated, but not told from chance; measuring again may. ``not judged``: the figure is
not known on one side, or hangs on a machine that differs; the reason is said."""


@dataclass(frozen=True)
class Change:
    """One figure of a case, then and now.

    Attributes:
        base, new: medians over repeats; ``None`` where not known.
        ratio: new over base; ``None`` where it has no meaning.
        interval: 95 % of the ratio, where there are samples.
        p_value: of being worse by chance (Mann-Whitney, one-sided), where there are samples.
        allowed: by how much it may get worse, in its unit: never below ``noise`` nor the figures' own resolution.
            ``None``: it is not watched.
        tolerance: which of the tolerances that hold is the closest.
        noise: what this machine's repeats differ by, in its unit.
        reason: why it is undecided or not judged.
        causes: what a change beyond ``allowed`` is made of.
        was_asked: whether a suite or the command line names the metric.
    """

    case_id: str
    metric: Metric
    base: float | None
    new: float | None
    verdict: Verdict
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    allowed: float | None = None
    tolerance: Tolerance | None = None
    noise: float = 0.0
    reason: str | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def is_watched(self) -> bool:
        return self.allowed is not None

    def sentence(self) -> str:
        """In one line: 'llama-60m/bf16/train/cpu: peak_live 517.8 MiB → 533.4 MiB (+3.0 %, tolerance 1 %): …'."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pair:
    """A case in both measurements, or in one of them.

    ``broke``: it ended well and does no more; the message of the new one, with its phase.
    """

    id: str
    base: MeasuredCase | None
    new: MeasuredCase | None
    changes: tuple[Change, ...] = ()
    broke: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of its watched figures."""
        raise NotImplementedError


@dataclass(frozen=True)
class Judgement:
    """One measurement against another."""

    base: Measured
    new: Measured
    pairs: tuple[Pair, ...]
    differences: tuple[Difference, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        raise NotImplementedError

    @property
    def suspects(self) -> tuple[str, ...]:
        """Ids of cases worth measuring again: something watched regressed or is undecided, or the case broke."""
        raise NotImplementedError

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of cases that ended well in the base and were not measured (or were skipped) now."""
        raise NotImplementedError

    @property
    def exit_code(self) -> int:
        """0 fine, 1 regressed or broke, 3 something that was to be judged could not be."""
        raise NotImplementedError

    def sentences(self) -> list[str]:
        """A line for each regression, broken or missing case, what could not be judged, and what got better."""
        raise NotImplementedError


def judge(
    base: Measured,
    new: Measured,
    tolerances: Tolerances,
    *,
    across_machines: bool = False,
) -> Judgement:
    """Compare every case of the base with the same one of the new measurement.

    Args:
        across_machines: judge figures that hang on the machine although it differs.
    """
    raise NotImplementedError


def judge_case(
    base: MeasuredCase,
    new: MeasuredCase,
    tolerances: Tolerances,
    *,
    noise: Noise | None = None,
    differences: Sequence[Difference] = (),
) -> Pair:
    """Compare two measurements of one case.

    Args:
        noise: of the machine.
        differences: of the machines, with what they bar.
    """
    raise NotImplementedError
