"""What verbs that print tables share: options, folders, a run's table and the remarks below it."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from membench.errors import MembenchError
from membench.host.console import put
from membench.report.table_formats import DEFAULT, FORMATS

if TYPE_CHECKING:
    from membench import Run

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXPLAIN = (
    "every metric of every case, what each member of a stack changes, and what failed cases printed (csv and json have"
    " every metric anyway)"
)
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


def print_runs(runs: Sequence[Run], form: str, explain: bool) -> None:
    """Print the tables of runs, each with its remarks; in a flat format one table, of which each row names its run."""
    from membench.report import documents

    if len(runs) > 1 and FORMATS[form].is_flat:
        print_table(documents.flat_table(runs, form), form)
        for run in runs:
            print_remarks(_remarks(run, with_gates=True), form)
        return
    for number, run in enumerate(runs):
        if len(runs) > 1:
            blank = "\n" if number else ""
            print_table(f"{blank}{FORMATS[form].title(str(run.header.get('run')))}\n", form)
        print_run(run, form, explain, with_gates=True)


def print_run(run: Run, form: str, explain: bool, *, with_gates: bool = False) -> None:
    """Print a run's table, and its remarks where ``remarks_stream`` says.

    Args:
        with_gates: also print a line for each gate that is broken or was not checked.
    """
    from membench.report import text

    # In a terminal a table must fit; a program behind a pipe and a reader of Markdown expect whole rows.
    fits = sys.stdout.isatty() and FORMATS[form].breaks
    print_table(text.comparison(run.records, form, shutil.get_terminal_size().columns if fits else None), form)
    if explain and not FORMATS[form].is_flat:
        print_table(f"\n{text.explanation(run.records, form)}", form)
        if not FORMATS[form].is_for_machines:
            _print_outputs(run, form)
    if not FORMATS[form].is_for_machines:
        put()
    print_remarks(_remarks(run, with_gates=with_gates), form)


def _print_outputs(run: Run, form: str) -> None:
    """Print what the cases that failed had printed, as much as their records keep."""
    style = FORMATS[form]
    for record in run.records:
        if record.output_tail:
            block = style.block(record.output_tail.splitlines())
            print_table(f"\n{style.title(f'output of {record.id}')}\n\n{block}", form)


def _remarks(run: Run, *, with_gates: bool) -> tuple[str, ...]:
    from membench.report import broken_rules, savings, text

    said = broken_rules.remarks(run) if with_gates else text.remarks(run.records)
    return (*said, *savings.verdicts(run.records), *_nothing(run), f"kept in {run.path}")


def select_cases(runs: Sequence[Run], expression: str, *, with_others: bool) -> list[Run]:
    """Return the runs with only the cases that match an expression, without runs that have none.

    Args:
        with_others: also keep the cases that their ratios refer to.

    Raises:
        MembenchError: if no case matches.
    """
    from membench.records.comparison import with_compared
    from membench.suite import selection

    keep = selection.parse(expression)
    selected = []
    for run in runs:
        kept = tuple(record for record in run.records if keep(record.id))
        if kept:
            records = with_compared(run.records, kept) if with_others else kept
            selected.append(dataclasses.replace(run, records=records))
    if not selected:
        raise MembenchError(f"-k '{expression}' fits no case in {', '.join(str(run.path) for run in runs)}")
    return selected


def _nothing(run: Run) -> list[str]:
    if any(record.status != "skipped" for record in run.records):
        return []
    return ["nothing was measured: " + ("every case was skipped" if run.records else "no case was begun")]
