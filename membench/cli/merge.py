"""``membench merge``: put runs of one suite together."""

from __future__ import annotations

import argparse
from pathlib import Path

from membench.cli.output import Verbs, add_format, print_remarks, print_run
from membench.errors import EXIT_OK


def add(verbs: Verbs) -> None:
    merge = verbs.add_parser("merge", help="put runs of one suite together, such as those of its shares")
    merge.add_argument("run", nargs="+", type=Path, help="files of runs")
    merge.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    add_format(merge)
    merge.set_defaults(do=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from membench.records import merging
    from membench.records.run_file import read_run

    missing = merging.missing_shards([read_run(path) for path in arguments.run])
    run = merging.merge(arguments.run, arguments.output)
    print_run(run, arguments.format, explain=False)
    if missing:
        print_remarks([f"shares that are not among these runs: {', '.join(missing)}"], arguments.format)
    return EXIT_OK
