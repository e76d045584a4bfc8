"""``membench estimate``: what the cases of a suite need, without running them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from membench.cli import ci, rules, script
from membench.cli.output import EXPLAIN, Verbs, add_format, print_remarks, print_table
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, CannotCompare

if TYPE_CHECKING:
    from membench import Run


def add(verbs: Verbs) -> None:
    estimate = verbs.add_parser("estimate", help="estimate what the cases of a suite need, without running them")
    estimate.add_argument("suite", help="a suite's name or path; for a Python file, FILE or FILE::NAME")
    estimate.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    estimate.add_argument("--device", action="append", help="device instead of the suite's: cpu, cuda, 2xcpu, 8xcuda")
    estimate.add_argument("--output", type=Path, help="keep the estimates as a run's file in this folder")
    estimate.add_argument(
        "--against", metavar="RUN", type=Path, help="a run's file: print how far each estimate is from what it measured"
    )
    estimate.add_argument("--explain", action="store_true", help=EXPLAIN)
    add_format(estimate)
    rules.add_allow_skipped(estimate)
    ci.add(estimate)
    estimate.set_defaults(do=_told)


def _told(arguments: argparse.Namespace) -> int:
    with ci.reporting_errors(arguments, "estimate", arguments.suite):
        return _estimate(arguments)


def _estimate(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import case_outcomes, text
    from membench.suite import selection

    measured = membench.read_run(arguments.against) if arguments.against else None
    suite = membench.load_suite(arguments.suite, arguments.device)
    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    if not suite.select(keep):
        raise selection.no_case_matches(arguments.expression)
    if measured and not {case.id for case in suite.select(keep)} & {record.id for record in measured.records}:
        raise CannotCompare(f"{measured.path}: none of the suite's cases is in it")
    ci.refuse_unwritable(arguments)
    with script.showing_progress(suite, arguments.format) as tell:
        run = membench.estimate(suite, keep=keep, output=arguments.output, tell=tell)
    if measured:
        _print_errors(run, measured, arguments.format)
    else:
        print_table(text.comparison(run.records, arguments.format), arguments.format)
    if arguments.explain:
        print_table(f"\n{text.explanation(run.records, arguments.format)}", arguments.format)
    kept = [f"kept in {run.path}"] if arguments.output else []
    print_remarks((*text.remarks(run.records), *kept), arguments.format)
    checked = rules.check(suite.gates, suite.limits, run.records)
    checked.print_gates(arguments.format)
    checked.print_unchecked(arguments.format, is_allowed=arguments.allow_skipped)
    has_failed = any(record.status not in ("ok", "skipped") for record in run.records)
    code = checked.exit_code(EXIT_CASES_FAILED if has_failed else EXIT_OK, allows_skipped=arguments.allow_skipped)
    cases = case_outcomes.of_records(
        suite.name,
        checked.records,
        checked.outcomes,
        idle_limits=checked.idle_limits,
        allows_skipped=arguments.allow_skipped,
    )
    ci.write(arguments, f"membench estimate {suite.name}", cases, [text.comparison(run.records, "github")])
    return code


def _print_errors(run: Run, measured: Run, form: str) -> None:
    """Print how far the estimates are from what was measured."""
    from membench.report import estimate_errors

    found = estimate_errors.errors(run.records, measured.records)
    if found:
        print_table(estimate_errors.table(found, form), form)
    print_remarks(estimate_errors.summary(run.records, found), form)
