"""Two measurements of the same cases to a verdict on each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from membench.errors import EXIT_CANNOT_COMPARE, EXIT_CASES_FAILED, EXIT_OK, one_line
from membench.records.metric import Dependence, Metric
from membench.records.metrics import metrics_with
from membench.regression.attribution import Cause, causes
from membench.regression.decision import Decision, Verdict, decide, decide_time, timing_of
from membench.regression.machines import Difference, differences
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.noise import Noise
from membench.regression.timing import Timing
from membench.suite.tolerances import Tolerance, Tolerances
from membench.units import BYTES, format_bytes

_RESOLUTIONS = 2
"""By how many times its resolution a figure of the kernel's may be off. A resolution is what one core may have counted
by itself at one moment; a peak is read over several, and the highest of 50 runs is further off than most."""

_PAGE_BYTES = 4096
"""No memory comes in less: a change by less is none."""

_SAME_WITHOUT_RATIO = 0.05
_NOTHING = 1e-6
"""How near figures without a ratio (divergences, shares) are the same, where nobody says otherwise."""

_MOST_CAUSES = 3

_MORE_IN_TURN = "to tell such a time from chance, measure more rounds ('--repeats N'), or where less else is done"


@dataclass(frozen=True)
class Change:
    """One figure of a case, then and now.

    Attributes:
        base, new: medians over repeats; ``None`` where not known.
        ratio: new over base; ``None`` where it has no meaning.
        interval: 95 % of the ratio, where there are samples.
        p_value: of being worse by chance (Mann-Whitney, one-sided), where there are samples.
        allowed: by how much it may get worse, in its unit: never below the figures' own resolution nor, of anything
            but a time, ``noise``. ``None``: it is not watched.
        tolerance: which of the tolerances that hold is the closest.
        noise: by how much runs of the same code differ on this machine, in its unit; 0 where that is not known. A time
            that changed by less is not told from chance.
        reason: why it is undecided or not judged.
        advice: what would decide it.
        causes: what a change beyond ``allowed`` is made of.
        repeats: how often the new figure was measured.
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

    @property
    def is_watched(self) -> bool:
        return self.tolerance is not None

    @property
    def was_asked(self) -> bool:
        """Whether a suite or the command line names the metric."""
        return self.tolerance is not None and self.tolerance.origin != "default"

    def sentence(self) -> str:
        """In one line: 'llama-60m/bf16/train/cpu: peak_live 517.8 MiB → 533.4 MiB (+3.0%, tolerance 1%): …'."""
        then, now = (_shown(self.metric, value) for value in (self.base, self.new))
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

    ``broke``: it ends badly, and did not before; how, in which phase and why.
    """

    id: str
    base: MeasuredCase | None
    new: MeasuredCase | None
    changes: tuple[Change, ...] = ()
    broke: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of its watched figures."""
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
    """Whether both were measured in turn: there is then no better way, only more of it."""

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
        """Ids of cases worth measuring again: something watched regressed or is undecided.

        One that broke is not among them: that is no noise.
        """
        return tuple(pair.id for pair in self.pairs if pair.verdict in ("regressed", "undecided") and not pair.broke)

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of cases that ended well in the base and were not measured (or were skipped) now."""
        return tuple(
            pair.id
            for pair in self.pairs
            if pair.base and pair.base.is_measured and (pair.new is None or pair.new.status == "skipped")
        )

    @property
    def added(self) -> tuple[str, ...]:
        """Ids of cases that the base does not have."""
        return tuple(pair.id for pair in self.pairs if pair.base is None)

    @property
    def blocked(self) -> tuple[Change, ...]:
        """What was to be judged and could not be. Time on another machine counts only if it was asked for by name."""
        return tuple(
            change
            for change in self.not_judged
            if change.was_asked or not (change.barred and change.metric.depends_on == "time")
        )

    @property
    def exit_code(self) -> int:
        """0 fine, 1 regressed or broke, 3 something that was to be judged could not be."""
        if self.regressions or self.broken:
            return EXIT_CASES_FAILED
        compared = any(pair.base and pair.new and pair.base.is_measured and pair.new.is_measured for pair in self.pairs)
        return EXIT_CANNOT_COMPARE if self.missing or self.blocked or not compared else EXIT_OK

    def sentences(self) -> list[str]:
        """A line for each regression, broken or missing case, what could not be judged, and what got better."""
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
        """A line a reason, since one machine that differs touches every case."""
        cases: dict[tuple[str, str], list[str]] = {}
        for change in self.not_judged:
            cases.setdefault((change.metric.name, change.reason or ""), []).append(change.case_id)
        return [
            f"not judged: {metric} of {ids[0] if len(ids) == 1 else f'{len(ids)} cases'}: {reason}"
            for (metric, reason), ids in cases.items()
        ]


def _redefined(pair: Pair) -> list[str]:
    """What a name in the id stands for now and did not before: such a case is another one."""
    if pair.base is None or pair.new is None:
        return []
    before, now = pair.base.stands_for, pair.new.stands_for
    return [
        f"{pair.id}: its {name} is not what it was: {before[name]}, now {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]


def judge(
    base: Measured,
    new: Measured,
    tolerances: Tolerances,
    *,
    across_machines: bool = False,
    in_turn: bool = False,
) -> Judgement:
    """Compare every case of the base with the same one of the new measurement.

    Args:
        across_machines: judge figures that hang on the machine although it differs.
        in_turn: they were measured in turn.
    """
    unlike = differences(base.machine, new.machine)
    pairs = []
    for case_id in dict.fromkeys([*base.cases, *new.cases]):
        before, now = base.cases.get(case_id), new.cases.get(case_id)
        if before is None or now is None:
            pairs.append(Pair(case_id, before, now, broke=_broke(now) if now else None))
        else:
            barring = () if across_machines else unlike
            pairs.append(judge_case(before, now, tolerances, noise=base.noise, differences=barring))
    return Judgement(base, new, tuple(pairs), unlike, in_turn)


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
    if not base.is_measured or not new.is_measured or (base.status == "ok" and new.status != "ok"):
        return Pair(base.id, base, new, broke=_broke(new) if base.is_measured else None)
    barred: dict[Dependence, Difference] = {}
    for difference in differences:
        for each in difference.bars(base.on_gpu or new.on_gpu):
            barred.setdefault(each, difference)
    known = noise or Noise()
    changes = (
        _change(base, new, metric, tolerances, known, barred) for metric in metrics_with((*base.values, *new.values))
    )
    return Pair(base.id, base, new, tuple(change for change in changes if change is not None))


def _broke(new: MeasuredCase) -> str | None:
    """How a case ended that did not end well; a skipped one was not measured, which is something else."""
    if new.status in ("ok", "skipped"):
        return None
    where = f" in {new.ended_in}" if new.ended_in else ""
    return f"{new.status}{where}: {new.message}"


def _change(
    base: MeasuredCase,
    new: MeasuredCase,
    metric: Metric,
    tolerances: Tolerances,
    noise: Noise,
    barred: Mapping[Dependence, Difference],
) -> Change | None:
    field = metric.field
    before, now = base.value(field), new.value(field)
    held = tolerances.of(base.id, metric)
    if before is None and now is None:
        return None
    if before is None or now is None:
        whose, case = ("base", base) if before is None else ("new measurement", new)
        reason = f"the {whose} does not have it: {case.reasons.get(field, 'it has no such figure')}"
        # What is new to the measurement has nothing to be held against.
        closest = held[0] if held and before is not None else None
        return Change(base.id, metric, before, now, "not judged", reason=reason, tolerance=closest)
    closest = min(held, key=lambda one: one.allowed(before)) if held else None
    is_time = metric.depends_on == "time"
    factor = noise.factor(base.id, field) if is_time else None
    floor = (factor - 1) * abs(before) if factor else 0.0 if is_time else noise.floor(base.id, field)
    allowed = _allowed(metric, before, closest, base, new, 0.0 if is_time else floor)
    timing = timing_of(base, new, metric)
    ratio = now / before if metric.has_ratio and before else None
    is_barred = barred.get(metric.depends_on)
    if is_barred:
        judged = Decision("not judged", f"the machines differ in {is_barred}")
    elif is_time:
        judged = decide_time(metric, base, new, allowed, timing, factor, is_watched=closest is not None)
    else:
        judged = decide(metric, base, new, allowed, is_watched=closest is not None)
    return Change(
        base.id,
        metric,
        before,
        now,
        judged.verdict,
        ratio,
        _as_ratio_of_metric(metric, timing),
        None if timing is None else timing.p_value,
        None if closest is None else allowed,
        closest,
        floor,
        judged.reason,
        judged.advice,
        () if judged.verdict in ("same", "not judged") else causes(metric, base, new),
        len(new.values[field]),
        bool(is_barred),
    )


def _allowed(
    metric: Metric, before: float, closest: Tolerance | None, base: MeasuredCase, new: MeasuredCase, floor: float
) -> float:
    """By how much a figure may get worse: what is tolerated on top of what its sources may be off, or the noise."""
    within = metric.same_within if metric.has_ratio else _SAME_WITHOUT_RATIO
    tolerated = max(within * abs(before), _NOTHING) if closest is None else closest.allowed(before)
    off = sum(case.resolution_bytes.get(metric.field, 0) for case in (base, new))
    smallest = _PAGE_BYTES if metric.unit is BYTES else 0
    return max(tolerated + _RESOLUTIONS * off, floor, smallest)


def _as_ratio_of_metric(metric: Metric, timing: Timing | None) -> tuple[float, float] | None:
    if timing is None or timing.interval is None:
        return None
    low, high = timing.interval
    return (low, high) if metric.better == "lower" else (1 / high, 1 / low)


def _shown(metric: Metric, value: float | None) -> str:
    return "–" if value is None else metric.format(value)


def _signed(metric: Metric, amount: float) -> str:
    sign = "-" if amount < 0 else "+"
    return sign + metric.format(abs(amount)).removeprefix("+")
