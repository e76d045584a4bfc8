"""The gates of a run's suite that are broken in its records, or were not checked."""

from __future__ import annotations

from membench.errors import RuleError, one_line
from membench.records.metrics import own_metrics
from membench.records.run_file import Run
from membench.report import text
from membench.suite.gates import Outcome, outcomes
from membench.suite.rules import rules_of


def remarks(run: Run) -> list[str]:
    """Return the remarks on a run's records, and a line for each gate that is broken or was not checked."""
    return [*text.remarks(run.records), *(one_line(outcome.sentence()) for outcome in troubled_gates(run))]


def troubled_gates(run: Run) -> list[Outcome]:
    """Return the outcomes of gates that are broken, or were not checked."""
    try:
        _, gates = rules_of(run.header, own_metrics(run.header.get("own_metrics", ())))
    except RuleError:  # the suite was valid; the file may be damaged, or of a later version
        return []
    return [outcome for outcome in outcomes(gates, run.records) if outcome.holds is False or outcome.is_unchecked]
