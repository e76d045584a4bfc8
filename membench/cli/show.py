"""``membench show``: print the tables of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from membench.cli.output import EXPLAIN, RESULTS, Verbs, add_format, print_runs, print_table, select_cases
from membench.errors import EXIT_OK


def add(verbs: Verbs) -> None:
    show = verbs.add_parser("show", help="print the tables of runs (default: of the newest)")
    show.add_argument("run", nargs="*", type=Path)
    show.add_argument("--output", type=Path, default=RESULTS, help="folder of the newest run")
    instead = show.add_mutually_exclusive_group()
    instead.add_argument("--phases", action="store_true", help="print the phases of each case instead")
    instead.add_argument("--ranks", action="store_true", help="print the ranks of each case that has several instead")
    show.add_argument("--explain", action="store_true", help=EXPLAIN)
    show.add_argument("-k", dest="expression", help="only cases whose id matches, such as 'int8 and not train'")
    add_format(show)
    show.set_defaults(do=_show)


def _show(arguments: argparse.Namespace) -> int:
    import membench
    from membench.report import phase_table, rank_table

    files = arguments.run or [membench.newest_run(arguments.output)]
    runs = [membench.read_run(file) for file in files]
    if arguments.expression:
        runs = select_cases(runs, arguments.expression, with_others=not (arguments.phases or arguments.ranks))
    if arguments.phases:
        print_table(phase_table.phases_of_runs(runs, arguments.format), arguments.format)
    elif arguments.ranks:
        print_table(rank_table.ranks_of_runs(runs, arguments.format), arguments.format)
    else:
        print_runs(runs, arguments.format, arguments.explain)
    return EXIT_OK
