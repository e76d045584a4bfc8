"""One measurement against others, drawn: what changed, by how much, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from membench.errors import one_line
from membench.records.metric import Metric
from membench.records.metrics import metrics_with
from membench.regression.measured import Measured
from membench.regression.verdict import Change, Judgement, Pair
from membench.report.table_formats import DEFAULT, FORMATS
from membench.suite.gates import Outcome
from membench.units import format_ratio

_ALWAYS_SHOWN = ("weights", "peak_live", "time")


def table(judgements: Sequence[Judgement], form: str = DEFAULT) -> str:
    """DerivedMetrics by case, those of the base first, then a column for each measurement that is held against it.

    For reading: weights, live peak and time of each case, and whatever else is watched or shown in tables and changed
    by more than it may. In a flat format: every figure, with bytes, seconds, ratios and verdicts apart.
    """
    style = FORMATS[form]
    if style.is_flat:
        return style.render([row for judgement in judgements for row in _flat(judgement)])
    rows: list[dict[str, str]] = []
    titles = [style.cell(title) for title in _titles(judgements)]
    for case_id in dict.fromkeys(pair.id for judgement in judgements for pair in judgement.pairs):
        pairs = [_pair(judgement, case_id) for judgement in judgements]
        rows += _rows(style.cell(case_id), pairs, titles)
    return style.render(rows)


def remarks(judgement: Judgement) -> list[str]:
    """In what the machines and versions differ, then a line for all that is to be said."""
    name = one_line(judgement.new.name)
    lines = [f"{name} differs in {difference}" for difference in judgement.differences]
    lines += judgement.sentences()
    if judgement.added:
        lines.append(f"not in {judgement.base.name}: {', '.join(judgement.added)}")
    return [one_line(line) for line in lines]


def summary(judgement: Judgement) -> str:
    """The outcome in one line."""
    counts = {
        "regressed": len(judgement.regressions),
        "broken": len(judgement.broken),
        "undecided": len(judgement.undecided),
        "not judged": len(judgement.not_judged),
        "not measured now": len(judgement.missing),
        "better": len(judgement.better),
    }
    compared = [pair for pair in judgement.pairs if pair.changes]
    figures = sum(change.is_watched for pair in compared for change in pair.changes)
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing regressed"
    whose = f"{judgement.new.name} against {judgement.base.name}"
    return one_line(f"{whose}: {said}; {figures} figures of {len(compared)} cases watched")


def gates(outcomes: Sequence[Outcome], form: str = DEFAULT) -> str:
    """What each rule came to in each case."""
    style = FORMATS[form]
    held = {True: "holds", False: "broken", None: "not checked"}
    rows = [
        {
            "case": style.cell(outcome.case_id),
            "rule": style.cell(outcome.gate.text),
            "outcome": held[outcome.holds],
            "left": outcome.left or "–",
            "right": outcome.right or "–",
        }
        for outcome in outcomes
    ]
    return style.render(rows)


def figures(measured: Measured, form: str = DEFAULT) -> str:
    """What a baseline holds: a row a case, the medians over its repeats."""
    cases = measured.cases.values()
    metrics = metrics_with(field for case in cases for field in case.values)
    known = [
        metric for metric in metrics if metric.in_table and any(case.value(metric.field) is not None for case in cases)
    ]
    style = FORMATS[form]
    if style.is_flat:
        rows: list[dict[str, object]] = [
            {"case": case.id, "status": case.status, **{metric.field: case.value(metric.field) for metric in metrics}}
            for case in cases
        ]
        return style.render(rows)
    shown = [
        {
            "case": style.cell(case.id),
            "status": case.status,
            **{
                metric.title: _figure(metric, case.value(metric.field), is_disturbed=metric.field in case.disturbed)
                for metric in known
            },
        }
        for case in cases
    ]
    return style.render(shown)


def _titles(judgements: Sequence[Judgement]) -> list[str]:
    """Of the columns, base first; two of one name are told apart."""
    found: list[str] = []
    for measured in (judgements[0].base, *(judgement.new for judgement in judgements)):
        name, again = one_line(measured.name), 2
        while name in found:
            name, again = f"{one_line(measured.name)} ({again})", again + 1
        found.append(name)
    return found


def _pair(judgement: Judgement, case_id: str) -> Pair | None:
    return next((pair for pair in judgement.pairs if pair.id == case_id), None)


def _rows(first: str, pairs: Sequence[Pair | None], titles: Sequence[str]) -> Iterator[dict[str, str]]:
    base = next((pair.base for pair in pairs if pair and pair.base), None)
    statuses = [base.status if base else "–", *(pair.new.status if pair and pair.new else "–" for pair in pairs)]
    if set(statuses) != {"ok"}:
        yield {"case": first, "figure": "status", **dict(zip(titles, statuses, strict=True))}
        first = ""
    for metric in metrics_with(change.metric.field for pair in pairs if pair for change in pair.changes):
        changes = [_of_metric(pair, metric) for pair in pairs]
        if not _is_shown(metric, changes):
            continue
        first_known = next((change for change in changes if change and change.base is not None), None)
        before = "–"
        if first_known is not None:
            before = _figure(metric, first_known.base, is_disturbed=first_known.base_is_disturbed)
        cells = [before, *(_cell(change) for change in changes)]
        yield {"case": first, "figure": metric.title, **dict(zip(titles, cells, strict=True))}
        first = ""


def _of_metric(pair: Pair | None, metric: Metric) -> Change | None:
    return next((change for change in pair.changes if change.metric is metric), None) if pair else None


def _is_shown(metric: Metric, changes: Sequence[Change | None]) -> bool:
    known = [change for change in changes if change is not None]
    if metric.name in _ALWAYS_SHOWN:
        return bool(known)
    is_said_by_time = metric.role == "rate" and metric.part == "step"
    of_interest = metric.in_table and not is_said_by_time
    return any(change.verdict != "same" and (change.is_watched or of_interest) for change in known)


def _figure(metric: Metric, value: float | None, *, is_disturbed: bool = False) -> str:
    return "–" if value is None else f"{'~' if is_disturbed else ''}{metric.format(value)}"


def _cell(change: Change | None) -> str:
    if change is None:
        return "–"
    told = [_figure(change.metric, change.new, is_disturbed=change.new_is_disturbed)]
    if change.ratio is not None:
        mark = "~" if change.base_is_disturbed or change.new_is_disturbed else ""
        told.append(f"{mark}{format_ratio(change.ratio)}")
    if change.interval is not None:
        told.append("[{}]".format(", ".join(format_ratio(end).removeprefix("×") for end in change.interval)))
    if change.verdict != "same":
        told.append(change.verdict)
    return " ".join(told)


def _flat(judgement: Judgement) -> Iterator[Mapping[str, object]]:
    for pair in judgement.pairs:
        status = {
            "case": pair.id,
            "base": judgement.base.name,
            "new": judgement.new.name,
            "base_status": pair.base.status if pair.base else None,
            "new_status": pair.new.status if pair.new else None,
        }
        if not pair.changes:
            yield {**status, **dict.fromkeys(_FLAT), "verdict": pair.verdict, "message": pair.broke}
        for change in pair.changes:
            low, high = change.interval or (None, None)
            yield {
                **status,
                "metric": change.metric.field,
                "base_value": change.base,
                "new_value": change.new,
                "ratio": change.ratio,
                "ratio_low": low,
                "ratio_high": high,
                "p_value": change.p_value,
                "allowed": change.allowed,
                "verdict": change.verdict,
                "message": change.sentence() if change.is_watched and change.verdict != "same" else None,
            }


_FLAT = (
    "metric", "base_value", "new_value", "ratio", "ratio_low", "ratio_high", "p_value", "allowed", "verdict", "message",
)  # fmt: skip
