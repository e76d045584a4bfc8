"""``membench report`` and ``membench plot``: write reports and pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from membench.cli.output import Verbs, print_table, select_cases
from membench.errors import EXIT_OK, CannotCompare, MembenchError, ResultsError
from membench.host.console import put, without_commands
from membench.report.formats import DEFAULT_REPORT, PICTURES, REPORTS
from membench.report.table_formats import FORMATS

if TYPE_CHECKING:
    from membench import Run


_ESTIMATES = "a file that 'membench estimate SUITE --output FOLDER' kept: its estimates are lines beside bars of memory"


def add(verbs: Verbs) -> None:
    report = verbs.add_parser("report", help="write runs as one page for a browser, or in another format")
    report.add_argument("run", nargs="+", type=Path)
    report.add_argument("-o", dest="file", type=Path, help="file to write; its ending chooses the format")
    report.add_argument("--format", choices=tuple(REPORTS), help="default: as the file's ending says, else html")
    report.add_argument("--estimates", type=Path, help=_ESTIMATES)
    report.set_defaults(do=_report)

    plot = verbs.add_parser("plot", help="draw one kind of picture into a PNG or SVG file")
    plot.add_argument("run", nargs="+", type=Path)
    plot.add_argument("kind", choices=PICTURES)
    plot.add_argument(
        "-o",
        dest="file",
        type=Path,
        required=True,
        help="file to write, ending in .png or .svg; what is too much for one goes into further ones: FILE-2.png",
    )
    plot.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    plot.add_argument("--estimates", type=Path, help=_ESTIMATES)
    plot.set_defaults(do=_plot)


def _report(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import page

    ending = arguments.file.suffix.lower() if arguments.file else ""
    form = arguments.format or next((name for name, one in REPORTS.items() if one.ending == ending), None)
    if form is None and arguments.file:
        known = ", ".join(one.ending for one in REPORTS.values())
        raise MembenchError(f"{arguments.file}: its ending says no format; end it in {known}, or give --format")
    if form in (None, "html") and arguments.file is None and sys.stdout.isatty():
        raise MembenchError("a page is for a browser: write it to a file with -o report.html")
    if arguments.estimates and form not in (None, "html"):
        raise MembenchError(f"--estimates are lines in pictures; {form} has none: write a page (.html)")
    runs = [membench.read_run(path) for path in arguments.run]
    estimates = _estimates_of(runs, arguments.estimates)
    made = page.page(runs, estimates) if estimates else REPORTS[form or DEFAULT_REPORT].write(runs)
    if arguments.file is None:
        _print(made, form or DEFAULT_REPORT)
        return EXIT_OK
    try:
        arguments.file.write_text(f"{made}\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise ResultsError(f"{arguments.file}: cannot be written: {error.strerror}") from None
    return EXIT_OK


def _estimates_of(runs: Sequence[Run], path: Path | None) -> Run | None:
    """Return the estimates in a file.

    Raises:
        CannotCompare: if none of them is of a case of the runs.
    """
    import membench

    if path is None:
        return None
    estimates = membench.read_run(path)
    if not {record.id for record in estimates.records} & {record.id for run in runs for record in run.records}:
        raise CannotCompare(f"{path}: none of its cases is in {' or '.join(str(run.path) for run in runs)}")
    return estimates


def _print(made: str, form: str) -> None:
    if form == "html":
        # Its texts are escaped, and its scripts must stay as they are: their hashes are in it.
        print(without_commands(made, FORMATS[form].coded))
    else:
        print_table(made, "github" if form == "md" else form)


def _plot(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import files

    if arguments.estimates and arguments.kind != "memory":
        raise MembenchError(f"--estimates are drawn beside bars of memory; a picture of {arguments.kind} has none")
    runs = [membench.read_run(path) for path in arguments.run]
    estimates = _estimates_of(runs, arguments.estimates)
    if arguments.expression:
        others = arguments.kind != "timeline"
        runs = select_cases(runs, arguments.expression, with_others=others)
    drawn = files.draw(runs, arguments.kind, arguments.file, estimates)
    if len(drawn) > 1:
        put(f"drawn into {len(drawn)} files, {drawn[0]} to {drawn[-1].name}; -k takes some of the cases")
    return EXIT_OK
