"""``membench export``: write figures for services that keep a history."""

from __future__ import annotations

import argparse
from pathlib import Path

from membench.cli.output import RESULTS, Verbs, print_table
from membench.errors import EXIT_OK
from membench.report.formats import EXPORTS


def add(verbs: Verbs) -> None:
    export = verbs.add_parser("export", help="write a run's figures for services that keep their history")
    export.add_argument("format", choices=tuple(EXPORTS), help="github-action-benchmark's or Bencher's JSON")
    export.add_argument("run", nargs="?", type=Path, help="a run's file (default: the newest)")
    export.add_argument("--output", type=Path, default=RESULTS, help="folder of the newest run")
    export.set_defaults(do=_export)


def _export(arguments: argparse.Namespace) -> int:
    import membench

    run = membench.read_run(arguments.run or membench.newest_run(arguments.output))
    print_table(EXPORTS[arguments.format](run.records), "json")
    return EXIT_OK
