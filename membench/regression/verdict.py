"""The verdicts on two measurements of the same cases: on each figure, each case and on all of them."""

from __future__ import annotations

from dataclasses import dataclass

from membench.errors import EXIT_CANNOT_COMPARE, EXIT_CASES_FAILED, EXIT_OK, one_line
from membench.records.metric import Metric
from membench.regression.attribution import Cause
from membench.regression.decision import Verdict
from membench.regression.machines import Difference
from membench.regression.measured import Measured, MeasuredCase
from membench.suite.tolerances import Tolerance
from membench.units import BYTES, format_bytes

_MOST_CAUSES = 3
_MORE_IN_TURN = "to tell such a time from chance, measure more rounds ('--repeats N'), or where less else is done"


@dataclass(frozen=True)
class Change:
    """One metric of a case in both measurements.

    Attributes:
        base, new: medians over repeats; ``None`` if not known.
        ratio: new over base; ``None`` if it has no meaning.
        interval: 95% confidence interval of the ratio, if there are samples.
        p_value: probability of being worse by chance (Mann-Whitney, one-sided), if there are samples.
        allowed: by how much it may get worse, in its unit: never below the resolution of the values nor, except for
            times, below ``noise``. ``None``: it is not watched.
        tolerance: the strictest of the tolerances that apply.
        noise: by how much runs of the same code differ on this machine, in its unit; 0 if not known. A smaller change
            of a time cannot be told from chance.
        reason: why it is undecided or not judged.
        advice: what would decide it.
        causes: the parts of a change beyond ``allowed``.
        repeats: how often the new value was measured.
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
    advice: str | None = None
    causes: tuple[Cause, ...] = ()
    repeats: int = 0
    barred: bool = False
    """Not judged because the machines differ."""
    base_is_disturbed: bool = False
    """It is a time that other processes disturbed; ``new_is_disturbed`` likewise."""
    new_is_disturbed: bool = False

    @property
    def is_watched(self) -> bool:
        return self.tolerance is not None

    @property
    def was_asked(self) -> bool:
        """Whether a suite or the command line names the metric."""
        return self.tolerance is not None and self.tolerance.origin != "default"

    def sentence(self) -> str:
        """Return one line: 'llama-60m/bf16/train/cpu: peak_live 517.8 MiB → 533.4 MiB (+3.0%, tolerance 1%): …'."""
        sides = ((self.base, self.base_is_disturbed), (self.new, self.new_is_disturbed))
        then, now = (("~" if is_disturbed else "") + _shown(self.metric, value) for value, is_disturbed in sides)
        told = f"{self.case_id}: {self.metric.name} {then} → {now}"
        if self.base is None or self.new is None:
            return f"{told}: {self.reason}"
        told += f" ({', '.join([self._by(), *self._within()])})"
        why = [f"{_signed(self.metric, cause.amount)} {cause.words}" for cause in self.causes[:_MOST_CAUSES]]
        explained = ([self.reason] if self.reason else []) + ([", ".join(why)] if why else [])
        return f"{told}: {'; '.join(explained)}" if explained else told

    def _by(self) -> str:
        assert self.base is not None
        assert self.new is not None
        if self.ratio is None:
            return _signed(self.metric, self.new - self.base)
        percent = (self.ratio - 1) * 100
        told = f"{percent:+.1f}%" if abs(percent) >= 0.05 else f"{percent:+.2g}%"
        if self.interval:
            low, high = ((end - 1) * 100 for end in self.interval)
            told += f" [{low:+.1f}%, {high:+.1f}%]"
        return told

    def _within(self) -> list[str]:
        if self.tolerance is None or self.allowed is None or self.base is None:
            return []
        told = [f"tolerance {self.tolerance.shown}"]
        asked = self.tolerance.allowed(self.base)
        if self.metric.depends_on == "time" and self.noise and self.base:
            told.append(f"noise of this machine {self.noise / abs(self.base) * 100:.2g}%")
        elif self.allowed > asked and self.allowed == self.noise:
            told.append(f"noise of this machine {_shown(self.metric, self.noise)}")
        elif self.allowed > asked and self.metric.unit is BYTES:
            told.append(f"with the counters' granularity {format_bytes(self.allowed)}")
        if self.p_value is not None:
            told.append(f"p {self.p_value:.2g}")
        return told


@dataclass(frozen=True)
class Pair:
    """A case in both measurements, or in one of them.

    Attributes:
        broke: how, in which phase and why it fails now, if it did not fail before.
    """

    id: str
    base: MeasuredCase | None
    new: MeasuredCase | None
    changes: tuple[Change, ...] = ()
    broke: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its watched metrics."""
        if self.broke:
            return "regressed"
        found = {change.verdict for change in self.changes if change.is_watched}
        order: tuple[Verdict, ...] = ("regressed", "undecided", "not judged", "better")
        return next((verdict for verdict in order if verdict in found), "same")


@dataclass(frozen=True)
class Judgement:
    """One measurement against another."""

    base: Measured
    new: Measured
    pairs: tuple[Pair, ...]
    differences: tuple[Difference, ...]
    in_turn: bool = False
    """Whether both were measured in turn: then only more rounds give a better answer."""
    allows_skipped: bool = False
    """Whether a case may be skipped now that was measured in the base."""

    def _watched(self, verdict: Verdict) -> tuple[Change, ...]:
        return tuple(
            change for pair in self.pairs for change in pair.changes if change.is_watched and change.verdict == verdict
        )

    @property
    def regressions(self) -> tuple[Change, ...]:
        return self._watched("regressed")

    @property
    def broken(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.broke)

    @property
    def better(self) -> tuple[Change, ...]:
        return self._watched("better")

    @property
    def undecided(self) -> tuple[Change, ...]:
        return self._watched("undecided")

    @property
    def not_judged(self) -> tuple[Change, ...]:
        return self._watched("not judged")

    @property
    def suspects(self) -> tuple[str, ...]:
        """Ids of cases worth measuring again: a watched metric regressed or is undecided.

        A case that broke is not among them: that is not noise.
        """
        return tuple(pair.id for pair in self.pairs if pair.verdict in ("regressed", "undecided") and not pair.broke)

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of cases that were measured in the base and were not measured, or skipped, now."""
        return tuple(
            pair.id
            for pair in self.pairs
            if pair.base
            and pair.base.is_measured
            and (pair.new is None or (pair.new.status == "skipped" and not self.allows_skipped))
        )

    @property
    def added(self) -> tuple[str, ...]:
        """Ids of cases that the base does not have."""
        return tuple(pair.id for pair in self.pairs if pair.base is None)

    @property
    def blocked(self) -> tuple[Change, ...]:
        """Changes that could not be judged. A time on another machine counts only if it was asked for by name."""
        return tuple(
            change
            for change in self.not_judged
            if change.was_asked or not (change.barred and change.metric.depends_on == "time")
        )

    @property
    def exit_code(self) -> int:
        """0: fine; 1: a regression or a broken case; 3: cannot compare (a case is missing, a metric not judged)."""
        if self.regressions or self.broken:
            return EXIT_CASES_FAILED
        compared = any(pair.base and pair.new and pair.base.is_measured and pair.new.is_measured for pair in self.pairs)
        return EXIT_CANNOT_COMPARE if self.missing or self.blocked or not compared else EXIT_OK

    def sentences(self) -> list[str]:
        """Return a line for each regression, broken or missing case, metric that is not judged, and improvement."""
        lines = [f"{pair.id}: {pair.broke}" for pair in self.broken]
        lines += [f"regressed: {change.sentence()}" for change in self.regressions]
        lines += [f"undecided: {change.sentence()}" for change in self.undecided]
        lines += dict.fromkeys(
            _MORE_IN_TURN if self.in_turn else change.advice for change in self.undecided if change.advice
        )
        lines += self._lines_on_what_was_not_judged()
        lines += [
            f"nothing to compare with: {pair.id} ended in {self.base.name} as {pair.base.status}: {pair.base.message}"
            for pair in self.pairs
            if pair.base and pair.new and pair.new.is_measured and not pair.base.is_measured
        ]
        lines += [line for pair in self.pairs for line in _redefined(pair)]
        lines += [f"not measured now: {case_id}{self._why_missing(case_id)}" for case_id in self.missing]
        lines += [f"better: {change.sentence()}" for change in self.better]
        lines += [
            f"{pair.id}: {pair.new.message}"
            for pair in self.pairs
            if pair.new and pair.new.is_measured and pair.new.message and not pair.broke
        ]
        return [one_line(line) for line in lines]

    def _why_missing(self, case_id: str) -> str:
        new = self.new.cases.get(case_id)
        return f": skipped: {new.message}" if new else ""

    def _lines_on_what_was_not_judged(self) -> list[str]:
        """Return a line for each reason, since one machine that differs affects every case."""
        cases: dict[tuple[str, str], list[str]] = {}
        for change in self.not_judged:
            cases.setdefault((change.metric.name, change.reason or ""), []).append(change.case_id)
        return [
            f"not judged: {metric} of {ids[0] if len(ids) == 1 else f'{len(ids)} cases'}: {reason}"
            for (metric, reason), ids in cases.items()
        ]


def _redefined(pair: Pair) -> list[str]:
    """Return a line for each name in the id that stands for something else now, which makes it another case."""
    if pair.base is None or pair.new is None:
        return []
    before, now = pair.base.stands_for, pair.new.stands_for
    return [
        f"{pair.id}: its {name} is not what it was: {before[name]}, now {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]


def _shown(metric: Metric, value: float | None) -> str:
    return "–" if value is None else metric.format(value)


def _signed(metric: Metric, amount: float) -> str:
    sign = "-" if amount < 0 else "+"
    return sign + metric.format(abs(amount)).removeprefix("+")
