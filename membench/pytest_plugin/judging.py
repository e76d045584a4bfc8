"""Comparison of tests with an earlier measurement: ``--membench-compare`` and ``--membench-fail``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest

from membench.comparing import suspects
from membench.errors import MembenchError, RuleError, UnknownMetric
from membench.pytest_plugin import entries
from membench.pytest_plugin.outcome import MembenchWarning
from membench.pytest_plugin.sharing import FUNCTIONS, Sharing, suite_baseline_name
from membench.records.metric import Metric
from membench.records.record import Record
from membench.regression import baselines, sources
from membench.regression.judging import judge
from membench.regression.measured import Measured, of_records
from membench.regression.timing import LEAST_REPEATS
from membench.regression.verdict import Judgement, Pair
from membench.suite.tolerances import Tolerance, Tolerances, parse_fail


class Judge:
    """Compares one case at a time with the measurement that ``--membench-compare`` names."""

    def __init__(self, config: pytest.Config) -> None:
        """Read the options.

        Raises:
            MembenchError: if an option is wrong.
        """
        self._results = Sharing.of(config).output
        self._name: str = config.getoption("membench_compare")
        self._config = config
        command_line_tolerances(config)
        self._bases: dict[str, Measured] = {}
        if self._name and not any(name.startswith(f"{self._name}-") for name in self._baseline_names()):
            sources.load(self._name, self._results)

    @classmethod
    def of(cls, config: pytest.Config) -> Judge | None:
        """Return the judge of a pytest run; ``None`` without ``--membench-compare``."""
        if config.getoption("membench_compare") is None:
            return None
        judge = config.stash.get(_JUDGE, None)
        if judge is None:
            judge = config.stash[_JUDGE] = cls(config)
        return judge

    def _baseline_names(self) -> list[str]:
        return baselines.names(self._results / baselines.FOLDER.name)

    def _base(self, new: Measured) -> Measured:
        """Return the base for a suite: its part of the named baseline, that baseline itself, or the suite's own."""
        if new.suite not in self._bases:
            if self._name:
                own = suite_baseline_name(self._name, new.suite)
                name = own if own in self._baseline_names() else self._name
                self._bases[new.suite] = sources.load(name, self._results)
            else:
                self._bases[new.suite] = sources.baseline_for(new, self._results)
        return self._bases[new.suite]

    def failures(
        self,
        item: pytest.Item,
        suite: str,
        records: Sequence[Record],
        own_tolerances: Sequence[Tolerance],
        measure_again: Callable[[int], Record],
        own_metrics: Sequence[Metric] = (),
    ) -> list[str]:
        """Return a message for each regression of a case; undecided results become warnings of the test.

        Args:
            item: the test that measured the case.
            suite: the name of the case's suite.
            records: the records of its repeats.
            own_tolerances: tolerances of the suite or the test.
            measure_again: measures another repeat of the given number; a suspected regression must be confirmed by it.
            own_metrics: metrics of the suite's plug-ins.

        Raises:
            MembenchError: if there is nothing to compare with.
        """
        tolerances = Tolerances(suite=own_tolerances, command_line=command_line_tolerances(self._config, own_metrics))
        new = of_records(records, "this run", suite)
        base = self._base(new)
        own_base = dataclasses.replace(base, cases={id: case for id, case in base.cases.items() if id == records[0].id})
        entries.add_comparison(item, records[0].id, base.name, None if own_base.cases else list(base.cases))
        if not own_base.cases:
            return []  # a new case
        _, judgement = suspects.confirm(
            records,
            judge=lambda measured: judge(own_base, of_records(measured, "this run", suite), tolerances),
            measure_again=lambda measured, _, repeats: [
                *measured, *(measure_again(len(measured) + number) for number in range(repeats)),
            ],
        )  # fmt: skip
        for line in _warnings(judgement, suite):
            item.warn(MembenchWarning(line))
        lines = [f"{pair.id}: {pair.broke}" for pair in judgement.broken]
        lines += [f"regressed since {base.name}: {change.sentence()}" for change in judgement.regressions]
        return lines + [f"cannot be compared with {base.name}: {change.sentence()}" for change in judgement.blocked]


def _warnings(judgement: Judgement, suite: str) -> list[str]:
    """Return warnings for results that neither fail nor pass."""
    base = judgement.base
    lines = [f"undecided since {base.name}: {change.sentence()}" for change in judgement.undecided]
    lines += [
        f"not judged against {base.name}: {change.sentence()}"
        for change in judgement.not_judged
        if change not in judgement.blocked
    ]
    return lines + [line for pair in judgement.pairs for line in _too_few_repeats(pair, base.name, suite)]


def _too_few_repeats(pair: Pair, base: str, suite: str) -> list[str]:
    """Return warnings for times with a requested tolerance that have too few repeats for a verdict."""
    lines = []
    for change in pair.changes:
        # With a known noise of the machine, fewer repeats may suffice.
        if pair.base and change.was_asked and change.metric.depends_on == "time" and not change.noise:
            repeats = len(pair.base.values.get(change.metric.field, ()))
            if 0 < repeats < LEAST_REPEATS:
                lines.append(
                    f"{pair.id}: {change.metric.name} cannot be judged: {base} has it from {repeats}"
                    f" {'repeat' if repeats == 1 else 'repeats'}, and {LEAST_REPEATS} tell; {how_to_repeat(suite)}"
                )
    return lines


def how_to_repeat(suite: str) -> str:
    """Return advice on how to measure enough repeats."""
    if suite == FUNCTIONS:
        return f"mark the test with @pytest.mark.membench(repeats={LEAST_REPEATS})"
    return f"write 'repeats = {LEAST_REPEATS}' under [settings]"


def command_line_tolerances(config: pytest.Config, own: Sequence[Metric] = ()) -> list[Tolerance]:
    """Return the tolerances of ``--membench-fail`` for known metrics.

    Args:
        own: metrics of the suite's plug-ins; tolerances for metrics of other suites are skipped.

    Raises:
        RuleError: if a tolerance is invalid for another reason.
    """
    found = []
    for text in config.getoption("membench_fail"):
        with contextlib.suppress(UnknownMetric):
            found.append(_parse(text, own))
    return found


def refuse_unknown(config: pytest.Config, own: Iterable[Metric]) -> None:
    """Refuse a tolerance on a metric that no suite has, because it would never fail.

    Args:
        own: metrics of the plug-ins of all suites.

    Raises:
        UnknownMetric: with the most similar name.
    """
    known = tuple(dict.fromkeys(own))
    for text in config.getoption("membench_fail"):
        _parse(text, known)


def _parse(text: str, own: Sequence[Metric]) -> Tolerance:
    try:
        return parse_fail(text, own)
    except RuleError as error:
        # The error names the option --fail of membench's own command line.
        raise type(error)(f"--membench-{str(error).removeprefix('--')}") from None


_JUDGE = pytest.StashKey[Judge]()


def check_options(config: pytest.Config) -> None:
    """Check the options before anything is measured.

    Raises:
        pytest.UsageError: if an option is wrong.
    """
    try:
        if config.getoption("membench_save"):
            baselines.path_of(config.getoption("membench_save"))
        if config.getoption("membench_fail") and config.getoption("membench_compare") is None:
            raise MembenchError("--membench-fail says how much worse figures may get: add --membench-compare")
        Judge.of(config)
    except MembenchError as error:
        raise pytest.UsageError(f"membench: {error}") from None
