"""Holds what tests measure against an earlier measurement: ``--membench-compare`` and ``--membench-fail``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import pytest

from membench.comparing import suspects
from membench.errors import MembenchError, RuleError, UnknownMetric
from membench.pytest_plugin import entries
from membench.pytest_plugin.outcome import MembenchWarning
from membench.pytest_plugin.sharing import FUNCTIONS, Sharing, own_name
from membench.records.metric import Metric
from membench.records.record import Record
from membench.regression import baselines, sources
from membench.regression.judging import judge
from membench.regression.measured import Measured, of_records
from membench.regression.timing import LEAST_REPEATS
from membench.regression.verdict import Judgement, Pair
from membench.suite.tolerances import Tolerance, Tolerances, parse_fail


class Judge:
    """Judges one case at a time against what ``--membench-compare`` names."""

    def __init__(self, config: pytest.Config) -> None:
        """Read the options.

        Raises:
            MembenchError: if one of them is wrong, in one line.
        """
        self._results = Sharing.of(config).output
        self._name: str = config.getoption("membench_compare")
        self._config = config
        asked(config)
        self._bases: dict[str, Measured] = {}
        if self._name and not any(name.startswith(f"{self._name}-") for name in self._kept()):
            sources.load(self._name, self._results)

    @classmethod
    def of(cls, config: pytest.Config) -> Judge | None:
        """The judge of a pytest run, if there is to be one."""
        if config.getoption("membench_compare") is None:
            return None
        judge = config.stash.get(_JUDGE, None)
        if judge is None:
            judge = config.stash[_JUDGE] = cls(config)
        return judge

    def _kept(self) -> list[str]:
        return baselines.names(self._results / baselines.FOLDER.name)

    def _base(self, new: Measured) -> Measured:
        """What a suite is held against: its own part of the baseline named, else that; or the suite's own baseline."""
        if new.suite not in self._bases:
            if self._name:
                own = own_name(self._name, new.suite)
                name = own if own in self._kept() else self._name
                self._bases[new.suite] = sources.load(name, self._results)
            else:
                self._bases[new.suite] = sources.baseline_for(new, self._results)
        return self._bases[new.suite]

    def complaints(
        self,
        item: pytest.Item,
        suite: str,
        records: Sequence[Record],
        demanded: Sequence[Tolerance],
        measure_again: Callable[[int], Record],
        own: Sequence[Metric] = (),
    ) -> list[str]:
        """What is worse than before in one case, a line each; of what cannot be told the test is warned.

        Args:
            item: the test that measured it.
            suite: whose case it is.
            records: of its repeats.
            demanded: tolerances of the suite or the test.
            measure_again: measures one more repeat of this number: what looks worse is not called so before.
            own: metrics of the suite's plug-ins.

        Raises:
            MembenchError: if there is nothing to compare with.
        """
        tolerances = Tolerances(suite=demanded, command_line=asked(self._config, own))
        new = of_records(records, "this run", suite)
        base = self._base(new)
        alone = dataclasses.replace(base, cases={id: case for id, case in base.cases.items() if id == records[0].id})
        entries.add_comparison(item, records[0].id, base.name, None if alone.cases else list(base.cases))
        if not alone.cases:
            return []  # new since then
        _, judgement = suspects.confirm(
            records,
            judge=lambda measured: judge(alone, of_records(measured, "this run", suite), tolerances),
            measure_again=lambda measured, _, repeats: [
                *measured, *(measure_again(len(measured) + number) for number in range(repeats)),
            ],
        )  # fmt: skip
        for line in _doubts(judgement, suite):
            item.warn(MembenchWarning(line))
        lines = [f"{pair.id}: {pair.broke}" for pair in judgement.broken]
        lines += [f"regressed since {base.name}: {change.sentence()}" for change in judgement.regressions]
        return lines + [f"cannot be compared with {base.name}: {change.sentence()}" for change in judgement.blocked]


def _doubts(judgement: Judgement, suite: str) -> list[str]:
    """What fails nothing and is not known to be fine either."""
    base = judgement.base
    lines = [f"undecided since {base.name}: {change.sentence()}" for change in judgement.undecided]
    lines += [
        f"not judged against {base.name}: {change.sentence()}"
        for change in judgement.not_judged
        if change not in judgement.blocked
    ]
    return lines + [line for pair in judgement.pairs for line in _too_few_repeats(pair, base.name, suite)]


def _too_few_repeats(pair: Pair, base: str, suite: str) -> list[str]:
    """Times that were asked for by name, and that no verdict can come of."""
    lines = []
    for change in pair.changes:
        # Of a machine whose noise is known fewer repeats may say something.
        if pair.base and change.was_asked and change.metric.depends_on == "time" and not change.noise:
            repeats = len(pair.base.values.get(change.metric.field, ()))
            if 0 < repeats < LEAST_REPEATS:
                lines.append(
                    f"{pair.id}: {change.metric.name} cannot be judged: {base} has it from {repeats}"
                    f" {'repeat' if repeats == 1 else 'repeats'}, and {LEAST_REPEATS} tell; {how_to_repeat(suite)}"
                )
    return lines


def how_to_repeat(suite: str) -> str:
    """How a user gets enough repeats."""
    if suite == FUNCTIONS:
        return f"mark the test with @pytest.mark.membench(repeats={LEAST_REPEATS})"
    return f"write 'repeats = {LEAST_REPEATS}' under [settings]"


def asked(config: pytest.Config, own: Sequence[Metric] = ()) -> list[Tolerance]:
    """What ``--membench-fail`` says of metrics that are known here.

    Args:
        own: metrics of the plug-ins of the suite that is meant; those of others are not known.

    Raises:
        RuleError: if anything else of it cannot be understood.
    """
    found = []
    for text in config.getoption("membench_fail"):
        with contextlib.suppress(UnknownMetric):
            found.append(_parsed(text, own))
    return found


def refuse_unknown(config: pytest.Config, own: Iterable[Metric]) -> None:
    """Of a metric that no suite has nothing could be too much.

    Args:
        own: metrics of the plug-ins of all suites that there are.

    Raises:
        UnknownMetric: with the nearest right name.
    """
    known = tuple(dict.fromkeys(own))
    for text in config.getoption("membench_fail"):
        _parsed(text, known)


def _parsed(text: str, own: Sequence[Metric]) -> Tolerance:
    try:
        return parse_fail(text, own)
    except RuleError as error:
        # The command line of membench calls the same --fail.
        raise type(error)(f"--membench-{str(error).removeprefix('--')}") from None


_JUDGE = pytest.StashKey[Judge]()


def check_options(config: pytest.Config) -> None:
    """Look at the options before anything is measured.

    Raises:
        pytest.UsageError: in one line.
    """
    try:
        if config.getoption("membench_save"):
            baselines.path_of(config.getoption("membench_save"))
        if config.getoption("membench_fail") and config.getoption("membench_compare") is None:
            raise MembenchError("--membench-fail says how much worse figures may get: add --membench-compare")
        Judge.of(config)
    except MembenchError as error:
        raise pytest.UsageError(f"membench: {error}") from None
