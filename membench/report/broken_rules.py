"""The gates of a run's suite that are broken in its records, or were not checked, and limits on what no case has."""

from __future__ import annotations

from membench.errors import RuleError, one_line
from membench.records.metrics import own_metrics
from membench.records.run_file import Run
from membench.report import text
from membench.suite import limits
from membench.suite.gates import Outcome, outcomes
from membench.suite.rules import rules_of


def remarks(run: Run) -> list[str]:
    """Return the remarks on a run's records, and a line for each rule that is broken or was not checked."""
    gates = (one_line(outcome.sentence()) for outcome in troubled_gates(run))
    return [*text.remarks(run.records), *gates, *idle_limits(run)]


def troubled_gates(run: Run) -> list[Outcome]:
    """Return the outcomes of gates that are broken, or were not checked."""
    try:
        _, gates = rules_of(run.header, own_metrics(run.header.get("own_metrics", ())))
    except RuleError:  # the suite was valid; the file may be damaged, or of a later version
        return []
    return [outcome for outcome in outcomes(gates, run.records) if outcome.holds is False or outcome.is_unchecked]


def idle_gates(run: Run) -> list[str]:
    """Return a sentence for each gate whose figures no case of the run has."""
    ids = {record.id for record in run.records}
    return [outcome.sentence() for outcome in troubled_gates(run) if outcome.case_id not in ids]


def idle_limits(run: Run) -> list[str]:
    """Return a sentence for each limit on a metric that no case of the run has."""
    try:
        fields = limits.of_header(run.header, own_metrics(run.header.get("own_metrics", ())))
    except RuleError:
        return []
    return limits.on_no_figure(fields, run.records)
