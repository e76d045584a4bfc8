"""``membench export``: write figures for services that keep a history."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from membench.cli.output import RESULTS, Verbs, print_table
from membench.errors import EXIT_CASES_FAILED, EXIT_OK, one_line
from membench.host.console import put
from membench.report.formats import EXPORTS


def add(verbs: Verbs) -> None:
    export = verbs.add_parser("export", help="write a run's figures for services that keep their history")
    export.add_argument("format", choices=tuple(EXPORTS), help="github-action-benchmark's or Bencher's JSON")
    export.add_argument("run", nargs="?", type=Path, help="a run's file (default: the newest)")
    export.add_argument("--output", type=Path, default=RESULTS, help="folder of the newest run")
    export.set_defaults(do=_export)


def _export(arguments: argparse.Namespace) -> int:
    import membench

    file = arguments.run or membench.newest_run(arguments.output)
    records = membench.read_run(file).records
    exported = EXPORTS[arguments.format](records)
    if not json.loads(exported):
        # A service would take an empty document for a run and show a gap in its history, or nothing at all.
        ends = ", ".join(f"{record.id} {record.status}" for record in records[:3])
        more = f" and {len(records) - 3} more" if len(records) > 3 else ""
        reason = f"no case has figures ({ends}{more})" if records else "the run has no cases"
        put(f"membench: {one_line(f'{file}: nothing to export: {reason}')}", file=sys.stderr)
        return EXIT_CASES_FAILED
    print_table(exported, "json")
    return EXIT_OK
