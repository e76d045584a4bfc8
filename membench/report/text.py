"""Records as tables for reading, and remarks on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from membench.errors import one_line
from membench.protocol.case import REFERENCE, Group
from membench.records.comparison import Comparison, prefixes
from membench.records.disturbed_times import WHY
from membench.records.highest_peak import RUNNING
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.report.cells import bound_of, change, figure, is_coarse, sign
from membench.report.flat import flat_rows
from membench.report.outcomes import said_of, status_of
from membench.report.table_formats import DEFAULT, FORMATS, TableFormat
from membench.units import format_bytes, format_ratio

# A technique has changed a metric that is not always shown if its ratio is this far from 1.
_DIFFERENT = 0.05


def comparison(records: Sequence[Record], form: str = DEFAULT, width: int | None = None) -> str:
    """Format a row per case, each value with its ratio to the reference; below a stack, a row for each member's share.

    For reading: a table for each model, workload and device, with the columns that have values there. In a flat
    format: one table in bytes and seconds, with ids and ratios in columns of their own.

    Args:
        width: width of the terminal in characters; the columns of a wider table continue in a table below.
    """
    style = FORMATS[form]
    if style.is_flat:
        return style.render(flat_rows(records))
    found = Comparison(records)
    tables = []
    for group in found.groups:
        rows = list(_rows(found, group, [metric for metric in found.metrics if is_shown(found, group, metric)]))
        rows = [{**row, "technique": style.cell(row["technique"])} for row in rows]
        tables.append("\n\n".join([style.title(" · ".join(group)), *_fitting(rows, style, width)]))
    return "\n\n".join(tables)


def is_shown(found: Comparison, group: Group, metric: Metric) -> bool:
    """Whether a metric has a column: whenever it is known, or only if a technique changes it.

    The peak of another phase must also exceed that of running, as only then it decides the memory needed.
    """
    if not metric.in_table:
        return False
    if metric.in_table is True:
        return found.is_known(group, metric.field)
    if metric.in_table == "where it needs more":
        return any(found.needs_more_in(group, technique, metric.field) for technique in found.techniques(group))
    if not metric.has_ratio:
        return len({found.value(group, technique, metric.field) for technique in found.techniques(group)} - {None}) > 1
    techniques = [
        technique
        for technique in found.techniques(group)
        if not is_coarse(found, group, technique, metric) and not found.is_untold(group, metric.field, technique)
    ]
    ratios = [found.ratio(group, technique, metric.field) for technique in techniques]
    changes = any(ratio is not None and abs(ratio - 1) > _DIFFERENT for ratio in ratios)
    return changes and (
        metric.in_table == "where it changes"
        or any(
            (found.value(group, technique, metric.field) or 0) > (found.value(group, technique, "peak_live_bytes") or 0)
            for technique in techniques
        )
    )


ON_FRONT, WHILE_RUNNING = "●", "○"
"""On the front by the highest peak of all phases; by the peak of running alone."""


def front_marks(found: Comparison, group: Group) -> dict[str, str]:
    """Return the mark of each technique on a Pareto front; none where a single technique was measured."""
    if len(found.techniques(group)) < 2:
        return {}
    by_highest, running = found.front(group), found.front(group, RUNNING)
    return {**dict.fromkeys(running, WHILE_RUNNING), **dict.fromkeys(by_highest, ON_FRONT)}


def _rows(found: Comparison, group: Group, metrics: Sequence[Metric]) -> Iterator[dict[str, str]]:
    techniques, marks = found.techniques(group), front_marks(found, group)
    has_stacks = any("+" in technique for technique in techniques)
    for technique in techniques:
        row = {"technique": found.title(group, technique), "status": status_of(found.repeats(group, technique))}
        for metric in metrics:
            row[metric.title] = figure(found, group, technique, metric)
        if len(techniques) > 1:
            row["Pareto"] = marks.get(technique, "")
        if has_stacks:
            together = found.interaction(group, technique, "peak_live_bytes") if "+" in technique else None
            row["together"] = "" if together is None else format_ratio(together)
        yield row
        if "+" in technique:
            yield from _marginal_rows(found, group, technique, row, metrics)


def _marginal_rows(
    found: Comparison, group: Group, stack: str, whole: Mapping[str, str], metrics: Sequence[Metric]
) -> Iterator[dict[str, str]]:
    """Yield what each member adds: its prefix of the stack over the prefix before it."""
    parts, before = found.within(group, stack), REFERENCE
    for member, prefix in zip(stack.split("+"), prefixes(stack), strict=True):
        row = dict.fromkeys(whole, "")
        row["technique"] = f"· {'+' if before != REFERENCE else ''}{member}"
        for metric in metrics:
            row[metric.title] = change(parts, group, prefix, metric, before)
        before = prefix
        yield row


def _fitting(rows: list[dict[str, str]], style: TableFormat, width: int | None) -> Iterator[str]:
    """Yield the rows as one table, or as several that fit the width, each with the two columns that name the case."""
    naming, left = list(rows[0])[:2], list(rows[0])[2:]
    taken = len(left)
    while True:
        shown = [{column: row[column] for column in (*naming, *left[:taken])} for row in rows]
        table = style.render(shown)
        if width is not None and taken > 1 and max(map(len, table.splitlines())) > width:
            taken -= 1
            continue
        yield table
        left = left[taken:]
        if not left:
            return
        taken = len(left)


def explanation(records: Sequence[Record], form: str = DEFAULT) -> str:
    """Format every metric of every case, and what each member of a stack changes, with a table per case.

    That of the reference has its own figures alone.
    """
    style, compared = FORMATS[form], Comparison(records)
    tables: dict[str, str] = {}  # by id: a reference may be in several groups
    for group in compared.groups:
        for technique in compared.techniques(group):
            case_id, found = compared.repeats(group, technique)[0].id, compared.within(group, technique)
            chain = list(dict.fromkeys((REFERENCE, *prefixes(technique))))
            rows = []
            for metric in found.metrics:
                if not found.is_known(group, metric.field) or (
                    technique == REFERENCE and metric.field not in compared.repeats(group, technique)[0].metrics
                ):
                    continue
                row = {"metric": metric.title}
                for before, step in zip([None, *chain], chain, strict=False):
                    value = found.value(group, step, metric.field)
                    shown = "–" if value is None else sign(found, group, step, metric) + metric.format(value)
                    # The difference to the reference is the value itself.
                    if before is not None and (metric.has_ratio or before != REFERENCE):
                        shown = f"{shown} {change(found, group, step, metric, before)}".rstrip()
                    row[style.cell(step)] = shown
                if "+" in technique:
                    together = found.interaction(group, technique, metric.field)
                    says_nothing = found.is_untold(group, metric.field, REFERENCE, technique, *technique.split("+"))
                    sign_of = "~" if says_nothing else ""
                    row["together"] = "" if together is None else sign_of + format_ratio(together)
                rows.append(row)
            # Medians of the parts would not add up to any moment that was measured.
            of = " of the first repeat" if any(len(found.repeats(group, step)) > 1 for step in chain) else ""
            for category, sizes in _breakdown(found, group, chain).items():
                told = {style.cell(step): size for step, size in sizes.items()}
                rows.append({"metric": f"at the peak{of}: {style.cell(category)}", **told})
            tables.setdefault(case_id, "\n\n".join([style.title(case_id), style.render(rows)]))
    return "\n\n".join(tables.values())


def _breakdown(found: Comparison, group: Group, chain: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the sizes by category that made up live memory at the peak of a step, for each case of a chain."""
    categories: dict[str, dict[str, str]] = {}
    for technique in chain:
        for record in found.repeats(group, technique)[:1]:
            if not record.processes:
                continue
            process = record.process_of(RUNNING)
            parts = process.breakdown_bytes or {}
            for category, size in parts.get(process.peak_part or "", {}).items():
                categories.setdefault(category, {})[technique] = format_bytes(size)
    return categories


_BEFORE_RUNNING = {
    "loading": "load_peak_live_bytes",
    "converting": "apply_peak_live_bytes",
    "packing training data": "store_peak_live_bytes",
    "the first step": "warmup_peak_live_bytes",
}
_SAID_IF_HIGHEST = ("packing training data", "the first step")


def remarks(records: Sequence[Record]) -> list[str]:
    """Return a line per failure, broken limit, remark and note, and on phases that need more than running.

    A table leaves out columns without figures, so that a line says why there is no live memory in it.
    """
    found = Comparison(records)
    phases = [phase for record in records for process in record.processes for phase in process.phases]
    lines = [
        f"live is not available under {phase.allocator}"
        for phase in phases
        if phase.allocator not in ("pinned", "default") and not phase.reads_gpu_itself
    ]
    for record in records:
        lines += [f"{record.id}: {text}" for text in said_of(record)]
        if found.reads_other_text(record):
            lines.append(f"{record.id}: worked on another text than its reference; ratios say nothing of the technique")
        running = found.value(record.group, REFERENCE, "peak_live_bytes")
        is_sure = bound_of(found, record.group, REFERENCE, METRIC_OF_FIELD["peak_live_bytes"]) != "≥"
        if record.repeat or record.technique == REFERENCE or running is None or not is_sure:
            continue
        for doing, field in _BEFORE_RUNNING.items():
            ratio = found.ratio(record.group, record.technique, field)
            how = record.obtained.get(field, {})
            # What the reference's loading needs as well is not a cost of the technique.
            changed = ratio is None or abs(ratio - 1) > _DIFFERENT
            if doing in _SAID_IF_HIGHEST:
                changed = found.needs_more_in(record.group, record.technique, field)
            taken = record.metrics.get(field) or 0
            if changed and how.get("bound") != "at most" and taken > running + how.get("resolution_bytes", 0):
                lines.append(
                    f"{record.id}: {doing} takes {format_bytes(taken)} of live memory,"
                    f" more than running the original ({format_bytes(running)})"
                )
    lines += _fronts_that_differ(found)
    lines += _shared_cores(records)
    ids = {record.id for record in records if found.is_disturbed(record.group, "step_median_s", record.technique)}
    if ids:
        whose = next(iter(ids)) if len(ids) == 1 else f"{len(ids)} cases"
        lines.append(f"{whose}: {WHY} while steps were timed; times marked ~ support no conclusion")
    return list(dict.fromkeys(map(one_line, lines)))  # several repeats may say the same


def _shared_cores(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each device with several ranks on this machine's cores."""
    for record in records:
        if record.device.shares_cores and record.status == "ok":
            cores = record.machine.get("cores")
            yield (
                f"{record.device}: {record.device.count} ranks share the {cores or 'cores'}{' cores' if cores else ''}"
                " of one machine: their memory is true, their times are not a cluster's and support no conclusion (~)"
            )


def _fronts_that_differ(found: Comparison) -> Iterator[str]:
    for group in found.groups:
        if WHILE_RUNNING in front_marks(found, group).values():
            yield (
                f"{' · '.join(group)}: {ON_FRONT} is on the Pareto front by the highest peak of all phases,"
                f" {WHILE_RUNNING} only by the live peak while running"
            )
