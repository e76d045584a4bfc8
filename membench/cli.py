"""The command line: verbs that only wire."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from membench.errors import EXIT_CASES_FAILED, EXIT_INTERRUPTED, EXIT_OK, MembenchError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="membench", description="Measure what memory-saving techniques really save.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    formats = ("simple", "github", "csv", "json", "latex", "html", "plain", "grid")

    run = verbs.add_parser("run", help="measure the cases of a suite and print a table")
    run.add_argument("suite", nargs="+", help="a suite's name or path")
    run.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    run.add_argument("--device", action="append", help="in place of the suite's devices: cpu, cuda, cuda:0")
    run.add_argument("--resume", action="store_true", help="go on with the newest run of this suite")
    run.add_argument("--output", type=Path, default=Path("results"), help="folder of the run's file")
    run.add_argument("--dry-run", action="store_true", help="print the cases and measure nothing")
    run.add_argument("--format", choices=formats, default="simple")
    run.set_defaults(do=_run)

    listing = verbs.add_parser("list", help="what there is: models, techniques, workloads, suites, a suite's cases")
    listing.add_argument(
        "what",
        nargs="?",
        help="models, techniques, workloads or suites; a suite's name or path, for its cases;"
        " the name of a model, technique or workload, for its options",
    )
    listing.set_defaults(do=_list)

    show = verbs.add_parser("show", help="the table of a run, the newest if none is named")
    show.add_argument("run", nargs="?", type=Path)
    show.add_argument("--output", type=Path, default=Path("results"), help="folder to look for the newest run in")
    show.add_argument("--phases", action="store_true", help="what each phase of each case took")
    show.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    show.add_argument("--format", choices=formats, default="simple")
    show.set_defaults(do=_show)

    doctor = verbs.add_parser("doctor", help="prove on known amounts what can be measured on this machine")
    doctor.add_argument("--full", action="store_true", help="also measure what the harness promises (some minutes)")
    doctor.add_argument("--format", choices=formats[:2], default="simple")
    doctor.set_defaults(do=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from membench import doctor

    return doctor.report(full=arguments.full, form=arguments.format)


def _run(arguments: argparse.Namespace) -> int:
    import membench
    from membench import selection
    from membench.progress import Display
    from membench.session import dry_run

    suites = [membench.load_suite(name, arguments.device) for name in arguments.suite]
    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    planned = dry_run(suites, keep)
    if not planned:
        raise MembenchError(f"-k '{arguments.expression}' fits no case; 'membench list SUITE' names them")
    if arguments.dry_run:
        print("\n".join(case.id for case in planned))
        return EXIT_OK
    from rich.console import Console

    code = EXIT_OK
    for suite in suites:
        try:
            with Display(Console(stderr=True)) as display:
                run = membench.run(suite, keep=keep, output=arguments.output, resume=arguments.resume, tell=display)
        except KeyboardInterrupt:
            print(
                f"interrupted; what is done is kept. To go on: membench run {suite.path} --resume"
                f" --output {arguments.output}",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED
        _print(run, arguments.format)
        if any(record.broken_limits or record.status not in ("ok", "skipped") for record in run.records):
            code = EXIT_CASES_FAILED
    return code


def _print(run: object, form: str) -> None:
    from membench.report import text
    from membench.store import Run

    assert isinstance(run, Run)
    # In a terminal a table must fit; whatever reads a pipe or a Markdown table wants whole rows.
    fits = sys.stdout.isatty() and form in ("simple", "plain", "grid")
    print(text.comparison(run.records, form, shutil.get_terminal_size().columns if fits else None))
    if form not in ("csv", "json"):
        print()
        for line in (*text.remarks(run.records), *text.verdicts(run.records), f"kept in {run.path}"):
            print(line)


def _list(arguments: argparse.Namespace) -> int:
    from membench import listing
    from membench.suite import is_suite, load_suite

    # A kind first, then a suite, then a plug-in: what a name means must not hang on what is installed.
    if arguments.what is None or arguments.what in listing.KINDS:
        lines = listing.overview((arguments.what,) if arguments.what else listing.KINDS)
    elif is_suite(arguments.what):
        lines = (case.id for case in load_suite(arguments.what).cases)
    else:
        lines = listing.details(arguments.what)
    for line in lines:
        print(line)
    return EXIT_OK


def _show(arguments: argparse.Namespace) -> int:
    import membench
    from membench import selection
    from membench.report import text
    from membench.store import newest_run

    run = membench.read_run(arguments.run or newest_run(arguments.output))
    if arguments.expression:
        keep = selection.parse(arguments.expression)
        run = dataclasses.replace(run, records=tuple(record for record in run.records if keep(record.id)))
    if arguments.phases:
        print(text.phases(run.records, arguments.format))
    else:
        _print(run, arguments.format)
    return EXIT_OK


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code: 0 fine, 1 a case failed or broke a limit, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = arguments.do(arguments)
    except MembenchError as error:
        print(f"membench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("membench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; what was measured is kept.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return code


if __name__ == "__main__":
    sys.exit(main())
