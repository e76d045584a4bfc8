"""``membench run --against-ref``: measure another commit and the current files in turn, and judge the difference."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from membench.cli import ci, rules
from membench.cli.interruption import TableIfInterrupted
from membench.cli.output import print_remarks
from membench.cli.regression import print_judgements
from membench.comparing.git import Repository
from membench.errors import MembenchError

if TYPE_CHECKING:
    from membench import Suite
    from membench.regression.verdict import Judgement
    from membench.suite.tolerances import Tolerances

ROUNDS = 5
"""Times are judged from three repeats on; with five, a change is easier to tell from noise."""


_NOT_JUDGED = "quality was not judged: no tolerance, limit or gate watches it (--fail kl:0.01, say, makes it judged)"


def missing_suite(arguments: argparse.Namespace, suite: Suite) -> str | None:
    """Return a message if the other commit lacks the suite, so that there is nothing to compare with; else ``None``.

    Raises:
        MembenchError: if there is no such commit, or the options do not go together.
    """
    if arguments.resume:
        raise MembenchError("--resume goes on with one run; --against-ref measures two in turn, afresh")
    _tolerances(arguments, suite)
    repository = Repository(Path.cwd())
    commit = repository.commit(arguments.against_ref)
    assert suite.path is not None  # one was named on the command line
    if repository.has(commit, suite.path):
        return None
    return (
        f"suite {suite.path} is not in '{arguments.against_ref}' ({commit[:12]}): there is nothing to compare with;"
        " what is here is measured alone"
    )


def _tolerances(arguments: argparse.Namespace, suite: Suite) -> Tolerances:
    from membench.suite.tolerances import Tolerances, parse_fail

    asked = [parse_fail(text, suite.own_metrics) for text in arguments.fail]
    Tolerances(command_line=asked).refuse_unmatched(case.id for case in suite.cases)
    return Tolerances(suite.tolerances, asked)


def watches_quality(suite: Suite, tolerances: Tolerances) -> bool:
    """Whether a tolerance, a limit or a gate is about quality over held-out text."""
    from membench.records.metrics import METRIC_OF_FIELD, is_of_held_out_text, metrics_by_name, metrics_with

    named = metrics_by_name(suite.own_metrics)
    ruled = [
        *(METRIC_OF_FIELD[field] for field in suite.limits),
        *(named[name] for gate in suite.gates for name in gate.metrics),
    ]
    known = metrics_with(metric.field for metric in suite.own_metrics)
    watched = [metric for metric in known if any(tolerances.of(case.id, metric) for case in suite.cases)]
    return any(map(is_of_held_out_text, (*ruled, *watched)))


def run(arguments: argparse.Namespace, suite: Suite) -> int:
    """Measure both versions, print the comparison and return the exit code: 0 fine, 1 regressed, 3 cannot compare.

    Raises:
        MembenchError: if there is nothing to compare with.
    """
    from rich.console import Console

    from membench.cli.progress import Display
    from membench.comparing import against_commit, suspects
    from membench.regression.judging import judge
    from membench.regression.measured import of_run
    from membench.report import case_outcomes, regression
    from membench.suite import selection

    tolerances = _tolerances(arguments, suite)
    rounds = arguments.repeats or max(ROUNDS, suite.settings.repeats)
    keep = selection.parse(arguments.expression) if arguments.expression else None
    evaluates = suite.settings.evaluate_s > 0 and watches_quality(suite, tolerances)
    begun = TableIfInterrupted(arguments.format)
    with (
        begun,
        Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display,
        against_commit.Interleaved(
            suite.with_repeats(rounds),
            arguments.against_ref,
            ids=[case.id for case in suite.select(keep)] if keep else None,
            devices=arguments.device,
            output=arguments.output,
            evaluates=evaluates,
            tell=begun.hearing(display),
        ) as both,
    ):
        changed = ", with changes that are not committed" if both.is_changed else ""
        names = (f"{arguments.against_ref} ({both.commit[:12]})", f"what is here{changed}")

        def judged(sides: against_commit.BothRuns) -> Judgement:
            base, head = (of_run(side, name) for side, name in zip(sides, names, strict=True))
            return judge(base, head, tolerances, in_turn=True)

        # Both sides' files keep earlier rounds, so what is measured again holds these, too.
        sides, judgement = suspects.confirm(
            both.measure(rounds), judged, measure_again=lambda _, ids, repeats: both.measure(repeats, ids)
        )
    print_judgements([judgement], arguments.format)
    checked = rules.check(suite.gates, suite.limits, sides.head.records)
    if not evaluates:
        print_remarks([_NOT_JUDGED], arguments.format)
    checked.print_gates(arguments.format)
    checked.print_limits(arguments.format)
    checked.print_unchecked(arguments.format, is_allowed=arguments.allow_skipped)
    print_remarks(["kept in {} and {}".format(*(os.path.relpath(side.path) for side in sides))], arguments.format)
    cases = case_outcomes.of_check(
        judgement,
        checked.records,
        checked.outcomes,
        idle_limits=checked.idle_limits,
        allows_skipped=arguments.allow_skipped,
    )
    ci.write(arguments, regression.summary(judgement), cases, [regression.table([judgement], "github")])
    return checked.exit_code(judgement.exit_code, allows_skipped=arguments.allow_skipped)
