"""What verbs that print tables share: options, folders, a run's table and the remarks below it."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from membench.errors import MembenchError
from membench.host.console import put
from membench.report.table_formats import DEFAULT, FORMATS

if TYPE_CHECKING:
    from membench import Run

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXPLAIN = "every metric of every case, and what each member of a stack changes (csv and json have every metric anyway)"
RESULTS = Path("results")


def add_format(verb: argparse.ArgumentParser, formats: Iterable[str] = FORMATS) -> None:
    """Add the option that chooses the format of a verb's tables."""
    verb.add_argument("--format", choices=tuple(formats), default=DEFAULT)


def remarks_stream(form: str) -> TextIO:
    """Return the stream for remarks: standard error if a program reads the tables, else standard output."""
    return sys.stderr if FORMATS[form].is_for_machines else sys.stdout


def print_table(text: str, form: str) -> None:
    """Print a table in its format."""
    put(text, coded=FORMATS[form].coded)


def print_remarks(lines: Iterable[str], form: str) -> None:
    """Print lines that accompany a table, where ``remarks_stream`` says."""
    for line in lines:
        put(FORMATS[form].remark(line), file=remarks_stream(form))


def print_run(run: Run, form: str, explain: bool) -> None:
    """Print a run's table, and its remarks where ``remarks_stream`` says."""
    from membench.report import savings, text

    # In a terminal a table must fit; a program behind a pipe and a reader of Markdown expect whole rows.
    fits = sys.stdout.isatty() and FORMATS[form].breaks
    print_table(text.comparison(run.records, form, shutil.get_terminal_size().columns if fits else None), form)
    if explain and not FORMATS[form].is_flat:
        print_table(f"\n{text.explanation(run.records, form)}", form)
    if not FORMATS[form].is_for_machines:
        put()
    remarks = (*text.remarks(run.records), *savings.verdicts(run.records), *_nothing(run), f"kept in {run.path}")
    print_remarks(remarks, form)


def select_cases(run: Run, expression: str, *, with_others: bool) -> Run:
    """Return a run with only the cases that match an expression.

    Args:
        with_others: also keep the cases that their ratios refer to.

    Raises:
        MembenchError: if no case matches.
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
