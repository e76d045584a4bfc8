"""``membench run``: measure suites or a program."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.cli import against, ci, rules, script
from membench.cli.interruption import TableIfInterrupted
from membench.cli.output import EXPLAIN, RESULTS, Verbs, add_format, print_remarks, print_run
from membench.cli.regression import add_fail
from membench.errors import EXIT_CASES_FAILED, EXIT_INTERRUPTED, EXIT_OK, MembenchError, ResultsError
from membench.host.console import put
from membench.report.table_formats import DEFAULT

if TYPE_CHECKING:
    from membench import Suite
    from membench.suite.sharding import Shard


def add(verbs: Verbs) -> None:
    run = verbs.add_parser("run", help="measure the cases of suites, or a program, and print a table")
    run.add_argument("suite", nargs="*", help="a suite's name or path; for a Python file, FILE or FILE::NAME")
    script.add(run)
    run.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    run.add_argument("--device", action="append", help="device to use instead of the suite's: cpu, cuda, cuda:0, 2xcpu")
    run.add_argument(
        "--shard", metavar="I/N", help="measure only share I of N; 'membench merge' puts the runs of all together"
    )
    run.add_argument("--resume", action="store_true", help="continue the newest run of the suite")
    run.add_argument("--output", type=Path, default=RESULTS, help="folder for the run's file")
    run.add_argument("--dry-run", action="store_true", help="print the cases without measuring them")
    run.add_argument(
        "--no-estimate", action="store_true", help="start cases that are estimated to need more memory than there is"
    )
    run.add_argument("--explain", action="store_true", help=EXPLAIN)
    add_format(run)
    run.add_argument(
        "--against-ref", metavar="GIT_REF",
        help="also measure that commit's code and suite, in turn with the current files; fail if something regressed",
    )  # fmt: skip
    run.add_argument(
        "--repeats",
        type=_repeats,
        help=f"of a program; with --against-ref: rounds of both versions (default: {against.ROUNDS})",
    )
    add_fail(run, "with --against-ref: ")
    rules.add_allow_skipped(run)
    ci.add(run)
    run.set_defaults(do=_told)


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError("write a number from 1 to 1000")
    return int(text)


def _told(arguments: argparse.Namespace) -> int:
    with ci.reporting_errors(arguments, "run", " ".join(arguments.suite)):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    import membench
    from membench.suite import selection, sharding
    from membench.suite.sharding import Shard

    is_script = script.is_asked_for(arguments)
    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    # Suites by the name on the command line; one in which -k matches no case is left out.
    chosen: dict[str, Suite] = {}
    if is_script:
        named = {arguments.script or arguments.module: script.suite(arguments)}
    else:
        named = {name: membench.load_suite(name, arguments.device) for name in arguments.suite}
    for name, suite in named.items():
        if suite.select(keep):
            chosen[name] = suite.without_estimates() if arguments.no_estimate else suite
        else:
            put(f"membench: {name} is left out: -k '{arguments.expression}' fits none of its cases", file=sys.stderr)
    if not chosen:
        raise selection.no_case_matches(arguments.expression)
    shard = Shard.parse(arguments.shard) if arguments.shard else None
    _refuse_shard_with_others(arguments)
    if arguments.dry_run:
        selected = {name: suite.select(keep) for name, suite in chosen.items()}
        shares = [sharding.share(cases, shard) if shard else cases for cases in selected.values()]
        put("\n".join(case.id for cases in shares for case in cases))
        return EXIT_OK
    ci.refuse_unwritable(arguments)
    alone: str | None = None
    if arguments.against_ref:
        if len(chosen) > 1:
            raise MembenchError("--against-ref compares one suite; name one")
        ((name, suite),) = chosen.items()
        alone = against.missing_suite(arguments, suite)
        if alone is None:
            return against.run(arguments, suite)
        if arguments.repeats:
            chosen[name] = suite.with_repeats(arguments.repeats)
        print_remarks([alone], arguments.format)
    elif not is_script and (arguments.repeats or arguments.fail):
        raise MembenchError(f"--{'repeats' if arguments.repeats else 'fail'} belongs to --against-ref GIT_REF")
    from membench.report import case_outcomes, markdown, text

    whole = [False] * len(chosen)
    resumed = _resumed(list(chosen.values()), arguments.output, shard) if arguments.resume else whole
    code, left = EXIT_OK, list(chosen)
    cases: list[case_outcomes.CheckedCase] = []
    begun: TableIfInterrupted | None = None
    tables = [markdown.escaped(alone)] if alone else []
    try:
        for suite, resume in zip(chosen.values(), resumed, strict=True):
            begun = TableIfInterrupted(arguments.format, arguments.explain)
            with begun, script.showing_progress(suite, arguments.format) as tell:
                run = membench.run(
                    suite, keep=keep, output=arguments.output, resume=resume, tell=begun.hearing(tell), shard=shard
                )
            script.print_phases(run.records, arguments.format)
            print_run(run, arguments.format, arguments.explain)
            checked = rules.check(suite.gates, suite.limits, run.records)
            checked.print_gates(arguments.format)  # the table's remarks include limits
            checked.print_unchecked(arguments.format, is_allowed=arguments.allow_skipped)
            if any(record.status not in ("ok", "skipped") for record in run.records):
                code = EXIT_CASES_FAILED
            code = checked.exit_code(code, allows_skipped=arguments.allow_skipped)
            left, begun = left[1:], None
            cases += case_outcomes.of_records(
                suite.name,
                checked.records,
                checked.outcomes,
                idle_limits=checked.idle_limits,
                allows_skipped=arguments.allow_skipped,
            )
            tables.append(text.comparison(run.records, "github"))
    except KeyboardInterrupt:
        kept_in = begun.path if begun else None
        if is_script and kept_in:
            put(f"interrupted; what was measured is kept in {kept_in}", file=sys.stderr)
            return EXIT_INTERRUPTED
        if not left or is_script:
            raise
        command = _command(arguments, left, kept_in is not None or bool(resumed[len(chosen) - len(left)]))
        put(f"interrupted; what is done is kept. To go on: {command}", file=sys.stderr)
        code = EXIT_INTERRUPTED
        cases.append(ci.unfinished(" ".join(left), "interrupted"))
    ci.write(arguments, f"membench run {' '.join(suite.name for suite in chosen.values())}", cases, tables)
    return code


def _refuse_shard_with_others(arguments: argparse.Namespace) -> None:
    """Refuse what does not go with a share of a suite.

    Raises:
        MembenchError: if that is asked for.
    """
    if arguments.shard and (arguments.against_ref or script.is_asked_for(arguments)):
        raise MembenchError(f"--shard {arguments.shard}: a program and --against-ref are not shared out")


def _resumed(suites: Sequence[Suite], output: Path, shard: Shard | None) -> list[bool | Path]:
    """Return the run that each suite continues; ``False`` for a suite that has not been started.

    A command runs its suites in order, so only runs that began after the first one's belong to it.
    """
    import membench

    first = membench.resumable(suites[0], output, shard=shard)
    if first is None:
        raise ResultsError(f"{output}: no run of suite '{suites[0].name}' there to go on with")
    since = membench.read_run(first).header.get("started_at", "")
    return [first, *(membench.resumable(suite, output, since, shard) or False for suite in suites[1:])]


def _command(arguments: argparse.Namespace, suites: Sequence[str], resume: bool) -> str:
    """Return the command line that measures what is left."""
    is_on_path = Path(sys.argv[0]).name == "membench"
    words = ["membench"] if is_on_path else [sys.executable, "-m", "membench"]
    words += ["run", *suites]
    if arguments.expression:
        words += ["-k", arguments.expression]
    for device in arguments.device or ():
        words += ["--device", device]
    if arguments.shard:
        words += ["--shard", arguments.shard]
    if resume:
        words.append("--resume")
    if arguments.output != RESULTS:
        words += ["--output", str(arguments.output)]
    if arguments.no_estimate:
        words.append("--no-estimate")
    if arguments.explain:
        words.append("--explain")
    if arguments.format != DEFAULT:
        words += ["--format", arguments.format]
    return shlex.join(words)
