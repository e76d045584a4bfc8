"""The command line: verbs that only wire."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench import console
from membench.errors import EXIT_CASES_FAILED, EXIT_INTERRUPTED, EXIT_OK, MembenchError, ResultsError, one_line

if TYPE_CHECKING:
    from membench import Run, Suite

# Whatever reads these must find nothing else in the output.
_FOR_MACHINES = ("csv", "json", "latex", "html")
_RESULTS = Path("results")
# What membench.report.formats and .files know; here, so that a parser is made without loading them.
_REPORTS = ("html", "md", "csv", "json", "latex")
_PLOTS = ("pareto", "memory", "conversion", "breakdown", "timeline", "history")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="membench", description="Measure what memory-saving techniques really save.")
    version = importlib.metadata.version("membench")
    parser.add_argument("--version", action="version", version=f"membench {version}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    explain = "every metric of every case, member by member of a stack (csv and json hold every metric anyway)"
    formats = ("simple", "github", "csv", "json", "latex", "html", "plain", "grid")

    run = verbs.add_parser("run", help="measure the cases of a suite and print a table")
    run.add_argument("suite", nargs="+", help="a suite's name or path")
    run.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    run.add_argument("--device", action="append", help="in place of the suite's devices: cpu, cuda, cuda:0")
    run.add_argument("--resume", action="store_true", help="go on with the newest run of the suite")
    run.add_argument("--output", type=Path, default=_RESULTS, help="folder of the run's file")
    run.add_argument("--dry-run", action="store_true", help="print the cases and measure nothing")
    run.add_argument("--explain", action="store_true", help=explain)
    run.add_argument("--format", choices=formats, default=formats[0])
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
    show.add_argument("--output", type=Path, default=_RESULTS, help="folder to look for the newest run in")
    show.add_argument("--phases", action="store_true", help="what each phase of each case took")
    show.add_argument("--explain", action="store_true", help=explain)
    show.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    show.add_argument("--format", choices=formats, default=formats[0])
    show.set_defaults(do=_show)

    report = verbs.add_parser("report", help="runs as one page for a browser, or as md, csv, json or latex")
    report.add_argument("run", nargs="+", type=Path)
    report.add_argument("-o", dest="file", type=Path, help="where to; its ending says the format, too")
    report.add_argument("--format", choices=_REPORTS, help="html if neither this nor the file's ending says")
    report.set_defaults(do=_report)

    plot = verbs.add_parser("plot", help="one kind of picture as a PNG or SVG file")
    plot.add_argument("run", nargs="+", type=Path)
    plot.add_argument("kind", choices=_PLOTS)
    plot.add_argument("-o", dest="file", type=Path, required=True, help="the file, which ends in .png or .svg")
    plot.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    plot.set_defaults(do=_plot)

    advise = verbs.add_parser("advise", help="which measured stack fits a budget and loses least (1 if none does)")
    advise.add_argument("run", type=Path)
    advise.add_argument("--budget", required=True, help="memory above the worker's baseline, such as 8GiB")
    advise.add_argument("--max-quality-loss", help="such as 1%%: of bits per byte, or in percentage points of accuracy")
    advise.set_defaults(do=_advise)

    doctor = verbs.add_parser("doctor", help="prove on known amounts what can be measured on this machine")
    doctor.add_argument("--full", action="store_true", help="also measure what the harness promises (some minutes)")
    doctor.add_argument("--format", choices=formats[:2], default=formats[0])
    doctor.set_defaults(do=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from membench import doctor

    return doctor.report(full=arguments.full, form=arguments.format)


def _run(arguments: argparse.Namespace) -> int:
    import membench
    from membench import selection

    keep = selection.parse(arguments.expression) if arguments.expression else lambda _: True
    # What is typed and what it stands for; a suite of which -k leaves nothing is left out.
    chosen: dict[str, Suite] = {}
    for name in arguments.suite:
        suite = membench.load_suite(name, arguments.device)
        if suite.select(keep):
            chosen[name] = suite
        else:
            print(f"membench: {name} is left out: -k '{arguments.expression}' fits none of its cases", file=sys.stderr)
    if not chosen:
        raise MembenchError(f"-k '{arguments.expression}' fits no case; 'membench list SUITE' names them")
    if arguments.dry_run:
        print("\n".join(case.id for suite in chosen.values() for case in suite.select(keep)))
        return EXIT_OK
    from rich.console import Console

    from membench.progress import Display

    resumed = _resumed(list(chosen.values()), arguments.output) if arguments.resume else [False] * len(chosen)
    code, left, has_begun = EXIT_OK, list(chosen), False
    try:
        for suite, resume in zip(chosen.values(), resumed, strict=True):
            # The library takes FORCE_COLOR for a terminal, which a log in a file is not.
            with Display(Console(stderr=True, force_terminal=sys.stderr.isatty())) as display:

                def tell(event: str, details: Mapping[str, Any], display: Display = display) -> None:
                    nonlocal has_begun
                    has_begun = has_begun or event == "start"
                    display(event, details)

                run = membench.run(suite, keep=keep, output=arguments.output, resume=resume, tell=tell)
            _print(run, arguments.format, arguments.explain)
            if any(record.broken_limits or record.status not in ("ok", "skipped") for record in run.records):
                code = EXIT_CASES_FAILED
            left, has_begun = left[1:], False
    except KeyboardInterrupt:
        if not left:
            raise
        command = _command(arguments, left, has_begun or bool(resumed[len(chosen) - len(left)]))
        print(f"interrupted; what is done is kept. To go on: {command}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _resumed(suites: Sequence[Suite], output: Path) -> list[bool | Path]:
    """The run to go on with of each suite; ``False`` for one that is to be begun.

    A command takes its suites in order: one that it had begun is of a later time than the first.
    """
    import membench

    first = membench.resumable(suites[0], output)
    if first is None:
        raise ResultsError(f"{output}: no run of suite '{suites[0].name}' there to go on with")
    since = membench.read_run(first).header.get("started_at", "")
    return [first, *(membench.resumable(suite, output, since) or False for suite in suites[1:])]


def _command(arguments: argparse.Namespace, suites: Sequence[str], resume: bool) -> str:
    """The command that does what is left of this one."""
    is_on_path = Path(sys.argv[0]).name == "membench"
    words = ["membench"] if is_on_path else [sys.executable, "-m", "membench"]
    words += ["run", *suites]
    if arguments.expression:
        words += ["-k", arguments.expression]
    for device in arguments.device or ():
        words += ["--device", device]
    if resume:
        words.append("--resume")
    if arguments.output != _RESULTS:
        words += ["--output", str(arguments.output)]
    if arguments.explain:
        words.append("--explain")
    if arguments.format != "simple":
        words += ["--format", arguments.format]
    return shlex.join(words)


def _print(run: Run, form: str, explain: bool) -> None:
    from membench.report import text

    # In a terminal a table must fit; whatever reads a pipe or a Markdown table wants whole rows.
    fits = sys.stdout.isatty() and form in ("simple", "plain", "grid")
    print(text.comparison(run.records, form, shutil.get_terminal_size().columns if fits else None))
    if explain and form not in ("csv", "json"):
        print(f"\n{text.explanation(run.records, form)}")
    if form not in _FOR_MACHINES:
        print()
    for line in (*text.remarks(run.records), *text.verdicts(run.records), *_nothing(run), f"kept in {run.path}"):
        print(line, file=sys.stderr if form in _FOR_MACHINES else sys.stdout)


def _nothing(run: Run) -> list[str]:
    if any(record.status != "skipped" for record in run.records):
        return []
    return ["nothing was measured: " + ("every case was skipped" if run.records else "no case was begun")]


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
    from membench.report import text

    run = membench.read_run(arguments.run or membench.newest_run(arguments.output))
    if arguments.expression:
        run = _narrowed(run, arguments.expression, with_others=not arguments.phases)
    if arguments.phases:
        print(text.phases(run.records, arguments.format))
    else:
        _print(run, arguments.format, arguments.explain)
    return EXIT_OK


def _narrowed(run: Run, expression: str, *, with_others: bool) -> Run:
    """A run's cases that fit an expression; with those that their ratios are made of, if asked for."""
    from membench import selection
    from membench.compare import with_compared

    keep = selection.parse(expression)
    kept = tuple(record for record in run.records if keep(record.id))
    if not kept:
        raise MembenchError(f"-k '{expression}' fits no case in {run.path}")
    return dataclasses.replace(run, records=with_compared(run.records, kept) if with_others else kept)


def _report(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import formats

    ending = arguments.file.suffix.lower() if arguments.file else ""
    form = arguments.format or next((form for form, own in formats.FORMATS.items() if own == ending), None)
    if form is None and arguments.file:
        known = ", ".join(formats.FORMATS.values())
        raise MembenchError(f"{arguments.file}: its ending says no format; end it in {known}, or give --format")
    if form in (None, "html") and arguments.file is None and sys.stdout.isatty():
        raise MembenchError("a page is for a browser: write it to a file with -o report.html")
    made = formats.report([membench.read_run(path) for path in arguments.run], form or "html")
    if arguments.file is None:
        print(made)
        return EXIT_OK
    try:
        arguments.file.write_text(f"{made}\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise ResultsError(f"{arguments.file}: cannot be written: {error.strerror}") from None
    return EXIT_OK


def _plot(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import files

    runs = [membench.read_run(path) for path in arguments.run]
    if arguments.expression:
        others = arguments.kind != "timeline"
        runs = [_narrowed(run, arguments.expression, with_others=others) for run in runs]
    files.draw(runs, arguments.kind, arguments.file)
    return EXIT_OK


def _advise(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import advice
    from membench.units import parse_bytes, parse_percent

    try:
        budget_bytes = parse_bytes(arguments.budget)
    except ValueError as error:
        raise MembenchError(f"--budget: {error}") from None
    try:
        most = parse_percent(arguments.max_quality_loss) if arguments.max_quality_loss else None
    except ValueError as error:
        raise MembenchError(f"--max-quality-loss: {error}") from None
    run = membench.read_run(arguments.run)
    if not run.records:
        raise MembenchError(f"{run.path}: no case was finished: there is nothing to advise from")
    given = advice.advise(run.records, budget_bytes, most)
    for line in advice.lines(run.records, given):
        print(one_line(line))
    return EXIT_OK if all(one.technique for one in given) else EXIT_CASES_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code: 0 fine, 1 a case failed or broke a limit, 2 bad input, 130 interrupted."""

    def work() -> int:
        arguments = _parser().parse_args(argv)
        code: int = arguments.do(arguments)
        return code

    return console.main(work)


if __name__ == "__main__":
    sys.exit(main())
