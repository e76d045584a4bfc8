"""What verbs that print tables share: formats, folders, a run's table with what must be said of it."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from membench.errors import MembenchError

if TYPE_CHECKING:
    from membench import Run

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

FORMATS = ("simple", "github", "csv", "json", "latex", "html", "plain", "grid")
EXPLAIN = "every metric of every case, member by member of a stack (csv and json hold every metric anyway)"
RESULTS = Path("results")
# Whatever reads these must find nothing else in the output.
FOR_MACHINES = ("csv", "json", "latex", "html")


def beside(form: str) -> TextIO:
    """Where lines for people go, beside a table of this format."""
    return sys.stderr if form in FOR_MACHINES else sys.stdout


def print_run(run: Run, form: str, explain: bool) -> None:
    """Print a run's table, and what must be said of it: beside the output where a machine reads that."""
    from membench.report import savings, text

    # In a terminal a table must fit; whatever reads a pipe or a Markdown table wants whole rows.
    fits = sys.stdout.isatty() and form in ("simple", "plain", "grid")
    print(text.comparison(run.records, form, shutil.get_terminal_size().columns if fits else None))
    if explain and form not in ("csv", "json"):
        print(f"\n{text.explanation(run.records, form)}")
    if form not in FOR_MACHINES:
        print()
    for line in (*text.remarks(run.records), *savings.verdicts(run.records), *_nothing(run), f"kept in {run.path}"):
        print(line, file=beside(form))


def narrowed(run: Run, expression: str, *, with_others: bool) -> Run:
    """A run's cases that fit an expression; with those that their ratios are made of, if asked for.

    Raises:
        MembenchError: if none fits.
    """
    from membench.records.comparison import with_compared
    from membench.suite import selection

    keep = selection.parse(expression)
    kept = tuple(record for record in run.records if keep(record.id))
    if not kept:
        raise MembenchError(f"-k '{expression}' fits no case in {run.path}")
    return dataclasses.replace(run, records=with_compared(run.records, kept) if with_others else kept)


def _nothing(run: Run) -> list[str]:
    if any(record.status != "skipped" for record in run.records):
        return []
    return ["nothing was measured: " + ("every case was skipped" if run.records else "no case was begun")]
