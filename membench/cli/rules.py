"""The outcome of a suite's limits and gates in a run, worked out once for tables, the exit code and CI output."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from membench.cli.output import print_remarks, remarks_stream
from membench.errors import EXIT_CANNOT_COMPARE, EXIT_CASES_FAILED
from membench.host.console import put
from membench.report.table_formats import DEFAULT, FORMATS

if TYPE_CHECKING:
    from membench.records.record import Record
    from membench.suite.gates import Gate, Outcome


@dataclass(frozen=True)
class Rules:
    """The outcome of limits and gates.

    Attributes:
        records: the judged records, which know the limits that they break.
        outcomes: of gates in these records.
        left_out: outcomes of gates in other records of the run, which were not asked for.
        idle_limits: a sentence for each limit on a metric that none of the records has.
    """

    records: Sequence[Record]
    outcomes: Sequence[Outcome]
    left_out: Sequence[Outcome] = ()
    idle_limits: Sequence[str] = ()

    @property
    def are_broken(self) -> bool:
        return any(outcome.holds is False for outcome in self.outcomes) or any(
            record.broken_limits for record in self.records
        )

    @property
    def unchecked(self) -> list[str]:
        """Return a line for each limit and gate that was not checked: for a skipped case, or for want of a figure."""
        limits = (f"{record.id}: {limit}" for record in self.records for limit in record.unchecked_limits)
        gates = (outcome.sentence() for outcome in self.outcomes if outcome.is_unchecked)
        return list(dict.fromkeys((*limits, *gates, *self.idle_limits)))

    def exit_code(self, otherwise: int, *, allows_skipped: bool) -> int:
        """Return the exit code: 1 for a broken rule, 3 for one that was not checked, unless there is worse otherwise.

        Args:
            otherwise: the exit code by all else.
            allows_skipped: whether rules of skipped cases, and on unknown figures, need not be checked.
        """
        if self.are_broken or otherwise == EXIT_CASES_FAILED:
            return EXIT_CASES_FAILED
        return EXIT_CANNOT_COMPARE if self.unchecked and not allows_skipped else otherwise

    def print_unchecked(self, form: str, *, is_allowed: bool) -> None:
        """Print limits on what no case has, how many limits and gates were not checked, and what that means."""
        print_remarks(self.idle_limits, form)
        if count := len(self.unchecked):
            were = "limit or gate was" if count == 1 else "limits and gates were"
            how = "which --allow-skipped passes" if is_allowed else "exit code 3, unless --allow-skipped is given"
            print_remarks([f"{count} {were} not checked: {how}"], form)

    def print_gates(self, form: str) -> None:
        """Print a table of the gates' outcomes, and a line for each gate that is broken or was not judged."""
        from membench.report import regression

        where = remarks_stream(form)
        if self.outcomes:
            readable = DEFAULT if FORMATS[form].is_for_machines else form
            put(f"\n{regression.gates(self.outcomes, readable)}\n", file=where, coded=FORMATS[readable].coded)
        print_remarks((outcome.sentence() for outcome in self.outcomes if not outcome.holds), form)
        for text in dict.fromkeys(outcome.gate.text for outcome in self.left_out):
            cases = [outcome.case_id for outcome in self.left_out if outcome.gate.text == text]
            print_remarks([f"not judged, since -k leaves it out: {text} in {', '.join(cases)}"], form)

    def print_limits(self, form: str) -> None:
        """Print a line for each limit that is broken or was not checked."""
        print_remarks(
            (
                f"{record.id}: {limit}"
                for record in self.records
                for limit in (*record.broken_limits, *record.unchecked_limits)
            ),
            form,
        )


def add_allow_skipped(verb: argparse.ArgumentParser) -> None:
    """Add the option that accepts limits and gates that were not checked."""
    verb.add_argument(
        "--allow-skipped",
        action="store_true",
        help="pass although limits and gates were not checked: of skipped cases (no GPU, a package that is missing),"
        " or on figures that are not known",
    )


def check(
    gates: Sequence[Gate],
    limits: Iterable[str],
    records: Sequence[Record],
    keep: Callable[[str], bool] | None = None,
) -> Rules:
    """Check a suite's limits and gates in the cases that were asked for.

    Args:
        limits: the fields of the metrics that have limits.
        records: of these cases and of those that they are compared with.
        keep: returns whether a case id was asked for; ``None``: all were.
    """
    from membench.suite.gates import outcomes
    from membench.suite.limits import on_no_figure

    found = outcomes(gates, records)
    if keep is None:
        return Rules(records, found, idle_limits=on_no_figure(limits, records))
    kept = [record for record in records if keep(record.id)]
    ids = {record.id for record in kept}
    judged = [outcome for outcome in found if outcome.case_id in ids or _is_of_no_figures(outcome, ids)]
    left_out = [outcome for outcome in found if outcome not in judged]
    return Rules(kept, judged, left_out, on_no_figure(limits, kept))


def _is_of_no_figures(outcome: Outcome, ids: Collection[str]) -> bool:
    """Return whether a gate matches cases that were asked for but names figures that no case has."""
    match = outcome.gate.match
    return outcome.case_id == match and any(fnmatch.fnmatchcase(case_id, match) for case_id in ids)
