"""The same cases over several runs, as lines from the earliest to the latest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from membench.host.environment import differences
from membench.protocol.case import Group
from membench.records.comparison import Comparison
from membench.records.disturbed_times import WHY
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.run_file import Run
from membench.report.cells import signed
from membench.report.drawing import Lines, Series, listed
from membench.report.summary import code_of, started
from membench.units import format_percent

_FOLLOWED = ("peak_live_bytes", "peak_footprint_bytes", "step_median_s", "bits_per_byte", "accuracy_percent")


def history(runs: Sequence[Run]) -> dict[tuple[str, Group], tuple[Lines, ...]]:
    """By suite and group, of those in more than one run: metrics from the earliest commit or run to the latest."""
    told: dict[tuple[str, Group], tuple[Lines, ...]] = {}
    for suite in dict.fromkeys(str(run.header.get("suite")) for run in runs):
        same = [run for run in runs if str(run.header.get("suite")) == suite]
        told |= {(suite, group): lines for group, lines in _of_suite(same).items()}
    return told


def _of_suite(runs: Sequence[Run]) -> dict[Group, tuple[Lines, ...]]:
    ordered = sorted(runs, key=_time_of(runs))
    compared = [Comparison(run.records) for run in ordered]
    told = {}
    for group in dict.fromkeys(group for found in compared for group in found.groups):
        within = [number for number, found in enumerate(compared) if group in found.groups]
        if len(within) > 1:
            taken = [(ordered[number], compared[number]) for number in within]
            fields = [field for field in _FOLLOWED if any(found.is_known(group, field) for _, found in taken)]
            told[group] = tuple(_lines(taken, group, METRIC_OF_FIELD[field]) for field in fields)
    return told


def _lines(runs: Sequence[tuple[Run, Comparison]], group: Group, metric: Metric) -> Lines:
    labels = _labels([run for run, _ in runs])
    order = ", in the order of their commits" if _are_of_commits([run for run, _ in runs]) else ""
    techniques = dict.fromkeys(technique for _, found in runs for technique in found.techniques(group))
    values = {name: [found.value(group, name, metric.field) for _, found in runs] for name in techniques}
    unit, step = metric.unit.axis(max((v for column in values.values() for v in column if v is not None), default=0.0))
    series = tuple(
        Series(name, tuple(None if value is None else value / step for value in column),
               tuple(signed(found, group, name, metric) for _, found in runs))
        for name, column in values.items() if any(value is not None for value in column)
    )  # fmt: skip
    changes, disturbed = [], []
    for name, column in values.items():
        first, last = column[0], column[-1]
        if any(runs[end][1].is_disturbed(group, metric.field, name) for end in (0, -1)):
            disturbed.append(name)
        elif first and last is not None and abs(last / first - 1) > metric.same_within:
            changes.append(f"{name} {format_percent(abs(last / first - 1) * 100)} {'more' if last > first else 'less'}")
    caption = f"{metric.title.capitalize()} over {len(runs)} runs{order}. The last against the first: "
    caption += f"{listed(changes)}." if changes else f"no change beyond {metric.same_within:.1%}."
    if disturbed:
        caption += f" Not compared, because {WHY}: {listed(disturbed)}."
    unlike = _unlike([run for run, _ in runs])
    for number, respects in unlike.items():
        caption += f" No line goes to {labels[number]}, on another machine or with other versions ({listed(respects)})."
    if len({run.header.get("suite_sha256") for run, _ in runs}) > 1:
        caption += " The suite's text has changed meanwhile."
    rows = ((one.name, *one.told) for one in series)
    return Lines(metric.title, caption, unit, labels, tuple(unlike), series, (("technique", *labels), *rows))


def _are_of_commits(runs: Sequence[Run]) -> bool:
    """Whether all runs know when their code was committed, and not all are of one commit."""
    times = {(run.header.get("code") or {}).get("committed_at") for run in runs}
    return None not in times and len(times) > 1


def _time_of(runs: Sequence[Run]) -> Callable[[Run], tuple[str, str]]:
    """Return the key by which runs are ordered: commits may be measured in any order, and older runs know none."""
    by_commit = _are_of_commits(runs)

    def key(run: Run) -> tuple[str, str]:
        return str(run.header["code"]["committed_at"]) if by_commit else "", str(run.header.get("started_at", ""))

    return key


def _unlike(runs: Sequence[Run]) -> dict[int, list[str]]:
    """By number, of each run that cannot be joined to the one before: in which respects their machines differ."""
    machines = [run.header.get("machine") or {} for run in runs]
    found = {number: differences(machines[number - 1], machines[number]) for number in range(1, len(runs))}
    return {number: respects for number, respects in found.items() if respects}


def _labels(runs: Sequence[Run]) -> tuple[str, ...]:
    """When each run began and of which commit; with its name where that does not tell it from another."""
    short = [f"{started(run) or run.header.get('run')} {_commit(run)}" for run in runs]
    named = [
        f"{label} {run.header.get('run')}" if short.count(label) > 1 else label
        for label, run in zip(short, runs, strict=True)
    ]
    return tuple(
        f"{label}, {named[: number + 1].count(label)}" if named.count(label) > 1 else label
        for number, label in enumerate(named)
    )


def _commit(run: Run) -> str:
    if (code := code_of(run)) is not None:
        return f"({code})"
    if "code" in run.header:
        return "(no commit)"
    # Earlier runs know that of membench alone.
    commit = (run.header.get("machine") or {}).get("commit")
    return f"(membench {commit})" if commit else "(commit not known)"
