"""``membench show``."""

from __future__ import annotations

import argparse
from pathlib import Path

from membench.cli.output import EXPLAIN, RESULTS, Verbs, add_format, narrowed, print_run
from membench.errors import EXIT_OK


def add(verbs: Verbs) -> None:
    show = verbs.add_parser("show", help="the table of a run, the newest if none is named")
    show.add_argument("run", nargs="?", type=Path)
    show.add_argument("--output", type=Path, default=RESULTS, help="folder to look for the newest run in")
    show.add_argument("--phases", action="store_true", help="what each phase of each case took")
    show.add_argument("--explain", action="store_true", help=EXPLAIN)
    show.add_argument("-k", dest="expression", help="only cases whose id fits, such as 'int8 and not train'")
    add_format(show)
    show.set_defaults(do=_show)


def _show(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import text

    run = membench.read_run(arguments.run or membench.newest_run(arguments.output))
    if arguments.expression:
        run = narrowed(run, arguments.expression, with_others=not arguments.phases)
    if arguments.phases:
        print(text.phases(run.records, arguments.format))
    else:
        print_run(run, arguments.format, arguments.explain)
    return EXIT_OK
