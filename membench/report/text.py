"""Records as a table, and a line a technique on what it saved and what it cost."""

from __future__ import annotations

import csv
import html
import io
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tabulate

from membench.errors import one_line
from membench.records.case import REFERENCE
from membench.records.comparison import Comparison, Group, prefixes
from membench.records.metric import Metric
from membench.records.metrics import METRIC_OF_FIELD, METRICS
from membench.records.record import Record
from membench.report import latex, markdown
from membench.units import format_bytes, format_difference, format_divergence, format_ratio, format_seconds

# From here on a technique has changed a metric that is not always shown.
_DIFFERENT = 0.05

# A figure is marked as approximate if its source may be off by more than this share of it.
_COARSE = 0.05


def comparison(records: Sequence[Record], form: str = "simple", width: int | None = None) -> str:
    """A row a case, each figure with its ratio to the reference; under a stack a row for what each member adds.

    For reading: a table for each model, workload and device, with the columns that have a figure there. As ``csv`` and
    ``json``: one flat table with bytes and seconds, ids and ratios apart.

    Args:
        width: of the terminal in characters; a table that is wider goes on below with its other columns.
    """
    if form in ("csv", "json"):
        return written(flat_rows(records), form)
    found = Comparison(records)
    tables = []
    for group in found.groups:
        rows = list(_rows(found, group, [metric for metric in found.metrics if is_shown(found, group, metric)]))
        rows = [{**row, "technique": in_cell(row["technique"], form)} for row in rows]
        tables.append("\n\n".join([_heading(" · ".join(group), form), *_fitting(rows, form, width)]))
    return "\n\n".join(tables)


def is_shown(found: Comparison, group: Group, metric: Metric) -> bool:
    """Whether a metric has a column: always if it is known, or where a technique changes it.

    One of loading and converting has to be above what running takes, too: there it decides what memory is needed.
    """
    if not metric.in_table:
        return False
    if metric.in_table is True:
        return found.is_known(group, metric.field)
    if not metric.has_ratio:
        return len({found.value(group, technique, metric.field) for technique in found.techniques(group)} - {None}) > 1
    techniques = [technique for technique in found.techniques(group) if not is_coarse(found, group, technique, metric)]
    ratios = [found.ratio(group, technique, metric.field) for technique in techniques]
    changes = any(ratio is not None and abs(ratio - 1) > _DIFFERENT for ratio in ratios)
    return changes and (
        metric.in_table == "where it changes"
        or any(
            (found.value(group, technique, metric.field) or 0) > (found.value(group, technique, "peak_live_bytes") or 0)
            for technique in techniques
        )
    )


def is_coarse(found: Comparison, group: Group, technique: str, metric: Metric) -> bool:
    """Whether a figure's source may be off by more than a twentieth of it."""
    value = found.value(group, technique, metric.field)
    return value is not None and found.resolution(group, technique, metric.field) > _COARSE * abs(value)


def _rows(found: Comparison, group: Group, metrics: Sequence[Metric]) -> Iterator[dict[str, str]]:
    techniques, front = found.techniques(group), found.front(group)
    has_stacks = any("+" in technique for technique in techniques)
    for technique in techniques:
        row = {"technique": technique, "status": status_of(found.repeats(group, technique))}
        for metric in metrics:
            row[metric.title] = figure(found, group, technique, metric)
        if len(techniques) > 1:
            row["Pareto"] = "●" if technique in front else ""
        if has_stacks:
            together = found.interaction(group, technique, "peak_live_bytes") if "+" in technique else None
            row["together"] = "" if together is None else format_ratio(together)
        yield row
        if "+" in technique:
            yield from _marginal_rows(found, group, technique, row, metrics)


def _marginal_rows(
    found: Comparison, group: Group, stack: str, whole: Mapping[str, str], metrics: Sequence[Metric]
) -> Iterator[dict[str, str]]:
    """What each member adds: its prefix of the stack over the prefix before it."""
    before = REFERENCE
    for member, prefix in zip(stack.split("+"), prefixes(stack), strict=True):
        row = dict.fromkeys(whole, "")
        row["technique"] = f"· {'+' if before != REFERENCE else ''}{member}"
        for metric in metrics:
            row[metric.title] = _change(found, group, prefix, metric, before)
        before = prefix
        yield row


def _change(found: Comparison, group: Group, technique: str, metric: Metric, base: str) -> str:
    """A metric against that of another case: its ratio, or where that has no meaning the difference."""
    if metric.has_ratio:
        ratio = found.ratio(group, technique, metric.field, base)
        return "" if ratio is None else bound_of_ratio(found, group, technique, metric, base) + format_ratio(ratio)
    difference = found.difference(group, technique, metric.field, base)
    if difference is None or not metric.has_difference:
        return ""
    return f"{'-' if difference < 0 else '+'}{metric.format(abs(difference)).removeprefix('+')}"


def figure(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """A case's figure as a table shows it: with its bound, its standard error, and its ratio to the reference."""
    if found.value(group, technique, metric.field) is None:
        return "–"
    shown = signed(found, group, technique, metric)
    if technique == REFERENCE or not metric.has_ratio:
        return shown
    return f"{shown} {_change(found, group, technique, metric, REFERENCE)}".rstrip()


def signed(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """A case's figure with its bound and its standard error; a dash where it is not known."""
    value = found.value(group, technique, metric.field)
    if value is None:
        return "–"
    shown = metric.format(value)
    if metric.loss is not None and metric.loss.error_field is not None:
        error = found.value(group, technique, metric.loss.error_field)
        shown += "" if error is None else f" ±{error:.4f}"
    return f"{_sign(found, group, technique, metric)}{shown}"


_SIGNS = {"at most": "≤", "at least": "≥"}
_REVERSED = {"≤": "≥", "≥": "≤"}


def _sign(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """What stands before a figure that is a bound, or approximate."""
    return bound_of(found, group, technique, metric) or ("~" if is_coarse(found, group, technique, metric) else "")


def bound_of(found: Comparison, group: Group, technique: str, metric: Metric) -> str:
    """``≤`` or ``≥`` where no more is known of a figure, else nothing."""
    bounds = {record.obtained.get(metric.field, {}).get("bound") for record in found.repeats(group, technique)}
    return next((sign for bound, sign in _SIGNS.items() if bound in bounds), "")


def bound_of_ratio(found: Comparison, group: Group, technique: str, metric: Metric, base: str) -> str:
    """What a ratio is where one of its figures is a bound; ``~`` where the two say nothing together."""
    own, of = bound_of(found, group, technique, metric), bound_of(found, group, base, metric)
    reversed_of = _REVERSED.get(of, "")
    if own and reversed_of and own != reversed_of:
        return "~"
    return own or reversed_of


def _fitting(rows: list[dict[str, str]], form: str, width: int | None) -> Iterator[str]:
    """The rows as one table, or as several that fit the width, each with the two columns that name the case."""
    naming, left = list(rows[0])[:2], list(rows[0])[2:]
    taken = len(left)
    while True:
        shown = [{column: row[column] for column in (*naming, *left[:taken])} for row in rows]
        table = tabulate.tabulate(shown, headers="keys", tablefmt=form, disable_numparse=True)
        if width is not None and taken > 1 and max(map(len, table.splitlines())) > width:
            taken -= 1
            continue
        yield table
        left = left[taken:]
        if not left:
            return
        taken = len(left)


def flat_rows(records: Sequence[Record]) -> list[dict[str, object]]:
    """A row a case with every metric, unrounded; ``None`` is not known."""
    found = Comparison(records)
    rows: list[dict[str, object]] = []
    for group in found.groups:
        for technique in found.techniques(group):
            repeats = found.repeats(group, technique)
            row: dict[str, object] = {"case": repeats[0].id, "status": status_of(repeats),
                                      "message": "; ".join(said_of(_worst(repeats)))}  # fmt: skip
            for metric in found.metrics:
                row[metric.field] = found.value(group, technique, metric.field)
                if metric.has_ratio:
                    row[f"{metric.name}_ratio"] = found.ratio(group, technique, metric.field)
            rows.append(row)
    return rows


def written(rows: Sequence[Mapping[str, object]], form: str) -> str:
    """Rows as ``csv`` or ``json``."""
    if form == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue().rstrip()


def _harmless(value: object) -> object:
    """A cell that no spreadsheet takes for a formula, and no terminal for a command."""
    if not isinstance(value, str):
        return value
    return f"'{one_line(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else one_line(value)


def _heading(title: str, form: str) -> str:
    """A table's title, as the format writes one."""
    match form:
        case "latex":
            return f"\\subsection*{{{latex.escaped(title)}}}"
        case "html":
            return f"<h3>{html.escape(one_line(title))}</h3>"
    return in_cell(title, form)


def in_cell(name: str, form: str) -> str:
    """A name for a table of tabulate's, which escapes by itself what means something in LaTeX and HTML."""
    return markdown.escaped(name) if form == "github" else one_line(name)


def explanation(records: Sequence[Record], form: str = "simple") -> str:
    """Every metric of every case, and of a stack what each member changes: a table a case, a row a metric."""
    found = Comparison(records)
    tables = []
    for group in found.groups:
        for technique in found.techniques(group):
            if technique == REFERENCE:
                continue
            chain = [REFERENCE, *prefixes(technique)]
            rows = []
            for metric in found.metrics:
                if not found.is_known(group, metric.field):
                    continue
                row = {"metric": metric.title}
                for before, step in zip([None, *chain], chain, strict=False):
                    value = found.value(group, step, metric.field)
                    shown = "–" if value is None else _sign(found, group, step, metric) + metric.format(value)
                    # Against the reference a difference is the figure itself.
                    if before is not None and (metric.has_ratio or before != REFERENCE):
                        shown = f"{shown} {_change(found, group, step, metric, before)}".rstrip()
                    row[in_cell(step, form)] = shown
                if "+" in technique:
                    together = found.interaction(group, technique, metric.field)
                    row["together"] = "" if together is None else format_ratio(together)
                rows.append(row)
            # A median of each part would be of no moment that there was.
            of = " of the first repeat" if any(len(found.repeats(group, step)) > 1 for step in chain) else ""
            for category, sizes in _breakdown(found, group, chain).items():
                told = {in_cell(step, form): size for step, size in sizes.items()}
                rows.append({"metric": f"at the peak{of}: {in_cell(category, form)}", **told})
            table = tabulate.tabulate(rows, headers="keys", tablefmt=form, disable_numparse=True)
            tables.append("\n\n".join([_heading(found.repeats(group, technique)[0].id, form), table]))
    return "\n\n".join(tables)


def _breakdown(found: Comparison, group: Group, chain: Sequence[str]) -> dict[str, dict[str, str]]:
    """By category, what held live memory at the highest moment of a step, of each case of a chain."""
    categories: dict[str, dict[str, str]] = {}
    for technique in chain:
        for record in found.repeats(group, technique)[:1]:
            for process in record.processes:
                parts = process.get("breakdown_bytes") or {}
                for category, size in parts.get(process.get("peak_part"), {}).items():
                    categories.setdefault(category, {})[technique] = format_bytes(size)
    return categories


def phases(records: Sequence[Record], form: str = "simple") -> str:
    """What each phase of each case took, and each part of a step in it; sizes above the worker's baseline.

    For reading: a table a case, without columns of which nothing is known. As ``csv`` and ``json``: one flat table with
    bytes and seconds.
    """
    if form in ("csv", "json"):
        return written([row for record in records for row in _phase_rows(record)], form)
    tables = []
    for record in records:
        rows = list(_phase_rows(record))
        formats = {field: format_seconds if field == "duration_s" else format_bytes for field in _PHASE_TITLES}
        known = [field for field in _PHASE_TITLES if any(row[field] is not None for row in rows)]
        shown = [
            {
                "phase": in_cell(f"· {row['part']}" if row["part"] else row["phase"], form),
                "allocator": in_cell(row["allocator"], form),
                **{_PHASE_TITLES[field]: _or_blank(row, field, formats[field]) for field in known},
            }
            for row in rows
        ]
        table = tabulate.tabulate(shown, headers="keys", tablefmt=form, disable_numparse=True)
        tables.append("\n\n".join(filter(None, [_heading(f"{record.id} · {record.status}", form), table])))
    return "\n\n".join(tables)


_PHASE_TITLES = {
    "duration_s": "time",
    "live_peak_bytes": "live peak",
    "live_held_bytes": "live held",
    "footprint_peak_bytes": "footprint peak",
    "gpu_peak_bytes": "GPU peak",
    "file_pages_bytes": "file pages",
}


def _or_blank(row: Mapping[str, Any], field: str, show: Callable[[float], str]) -> str:
    """A figure; a dash for a phase that lacks it, nothing for a part, of which memory is taken in one phase only."""
    if row[field] is None:
        return "" if row["part"] else "–"
    bound = row["bound"] if field == "footprint_peak_bytes" else None
    return f"{_SIGNS.get(str(bound), '')}{show(row[field])}"


def _phase_rows(record: Record) -> Iterator[dict[str, Any]]:
    """A row a phase and a row a part of it; ``None`` is not known."""
    for process in record.processes:
        for phase in process["phases"]:
            for part, entry in ((None, phase), *phase.get("parts", {}).items()):
                durations = entry.get("durations_s") or [entry.get("duration_s")]
                on_gpu = "cuda_peak_allocated_bytes" in entry
                row = {
                    "duration_s": None if durations[0] is None else statistics.median(durations),
                    "live_peak_bytes": entry.get("cuda_peak_allocated_bytes" if on_gpu else "peak_live_bytes"),
                    "live_held_bytes": entry.get("cuda_held_allocated_bytes" if on_gpu else "held_live_bytes"),
                    "footprint_peak_bytes": entry.get("peak_footprint_bytes"),
                    # A worker's own is in its live peak; what a user's program allocates there is seen from outside.
                    "gpu_peak_bytes": _gpu_peak(entry) if process["role"] == "script" else None,
                    "file_pages_bytes": entry.get("file_end_bytes"),
                }
                # The meter's own entry for what runs between parts says nothing that is shown here.
                if part is None or any(value is not None for value in row.values()):
                    yield {"case": record.id, "repeat": record.repeat, "status": record.status,
                           "role": one_line(process["role"]), "rank": process["rank"],
                           "phase": one_line(phase["name"]), "part": None if part is None else one_line(part),
                           "allocator": one_line(phase["allocator"]), **row,
                           "bound": entry.get("bound")}  # fmt: skip


def _gpu_peak(entry: Mapping[str, Any]) -> int | None:
    of_process: int | None = entry.get("gpu_process_peak_bytes")
    return entry.get("gpu_used_peak_bytes") if of_process is None else of_process


def _worst(repeats: Sequence[Record]) -> Record:
    return next((record for record in repeats if record.status != "ok"), repeats[0])


def status_of(repeats: Sequence[Record]) -> str:
    worst = _worst(repeats)
    if worst.status != "ok":
        return worst.status
    if any(record.broken_limits for record in repeats):
        return "over limit"
    return "ok, see below" if any(record.remarks for record in repeats) else "ok"


def said_of(record: Record) -> list[str]:
    """What is to be said of a record in words."""
    said = []
    if record.status != "ok":
        where = f" in {record.ended_in}" if record.ended_in else ""
        said.append(f"{record.status}{where}: {record.message}")
    return [one_line(text) for text in (*said, *record.broken_limits, *record.remarks, *record.notes)]


def remarks(records: Sequence[Record]) -> list[str]:
    """What must be said of cases: bad ends, broken limits, remarks, notes, converting that costs more than running."""
    found = Comparison(records)
    lines = []
    for record in records:
        lines += [f"{record.id}: {text}" for text in said_of(record)]
        if found.reads_other_text(record):
            lines.append(f"{record.id}: worked on another text than its reference; ratios say nothing of the technique")
        running = found.value(record.group, REFERENCE, "peak_live_bytes")
        is_sure = bound_of(found, record.group, REFERENCE, METRIC_OF_FIELD["peak_live_bytes"]) != "≥"
        if record.repeat or record.technique == REFERENCE or running is None or not is_sure:
            continue
        for doing, field in (("loading", "load_peak_live_bytes"), ("converting", "apply_peak_live_bytes")):
            ratio = found.ratio(record.group, record.technique, field)
            how = record.obtained.get(field, {})
            # What the reference's way of loading takes, too, is no cost of the technique.
            changed = ratio is None or abs(ratio - 1) > _DIFFERENT
            taken = record.metrics.get(field) or 0
            if changed and how.get("bound") != "at most" and taken > running + how.get("resolution_bytes", 0):
                lines.append(
                    f"{record.id}: {doing} takes {format_bytes(taken)} of live memory,"
                    f" more than running the original ({format_bytes(running)})"
                )
    return list(dict.fromkeys(map(one_line, lines)))  # several repeats may say the same


def verdicts(records: Sequence[Record]) -> list[str]:
    """One line a technique: what it saved and what it cost, from the smallest ratio over its cases to the largest.

    Left out is what cannot be told from no change: a ratio as near to one as runs of the same case are, a figure that
    is no further from the reference's than either may be off, a bound on the wrong side, and in a training a gain of
    quality, because its standard error is of the text and not of the training. Where data are only read the time of a
    token counts, not that of an epoch, which is shorter for less text. Where nothing else tells quality, how far the
    logits are from the reference's is a cost.
    """
    found = Comparison([record for record in records if record.status == "ok"])
    shown_in = {
        metric: [
            group
            for group in found.groups
            if is_shown(found, group, metric) and not _is_of_an_epoch(found, group, metric)
        ]
        for metric in METRICS
        if metric.in_table
    }
    lines = []
    for technique in dict.fromkeys(t for group in found.groups for t in found.techniques(group) if t != REFERENCE):
        said: dict[str, list[str]] = {"saved": [], "cost": [], "mixed": []}
        groups = [group for group in found.groups if found.repeats(group, technique)]
        if not any(found.repeats(group, REFERENCE) for group in groups):
            lines.append(f"{technique}: nothing to compare with: '{REFERENCE}' was not measured to its end")
            continue
        for metric, where in shown_in.items():
            reached = ratios_of(found, where, technique, metric)
            told = [ratio.gains for ratio in reached if ratio.tells]
            if told:
                values = [ratio.value for ratio in reached]
                shown = " to ".join(dict.fromkeys((format_ratio(min(values)), format_ratio(max(values)))))
                said[_kind(told)].append(f"{metric.title} {shown}")
        lost = [round(loss, 4) for loss in _losses_of(found, groups, technique, "lost_bits_per_byte")]
        if any(lost):
            shown = " to ".join(dict.fromkeys(format_difference(value) for value in (min(lost), max(lost))))
            said[_kind([loss < 0 for loss in lost if loss])].append(f"{shown} bits/byte")
        by_logits = [group for group in groups if found.quality_field(group) == "kl_nats"]
        far = [distance for distance in _losses_of(found, by_logits, technique, "kl_nats") if distance]
        if far:
            shown = " to ".join(dict.fromkeys(format_divergence(distance) for distance in (min(far), max(far))))
            said["cost"].append(f"KL {shown}")
        points = [found.difference(group, technique, "accuracy_percent") for group in groups]
        known = [point for point in points if point is not None]
        told = [loss < 0 for loss in _losses_of(found, groups, technique, "accuracy_percent") if loss]
        if told:
            shown = " to ".join(dict.fromkeys(f"{point:+.1f}" for point in (min(known), max(known))))
            said[_kind(told)].append(f"{shown} percent of samples")
        kept = [
            value for group in groups if (value := found.value(group, technique, "corpus_kept_percent")) is not None
        ]
        if kept:
            shown = " to ".join(dict.fromkeys(f"{100 - value:.3g}" for value in (max(kept), min(kept))))
            said["cost"].append(f"{shown} percent of the text")
        mixed = f"; depends on the case: {', '.join(said['mixed'])}" if said["mixed"] else ""
        saved, cost = (", ".join(said[kind]) or "nothing" for kind in ("saved", "cost"))
        lines.append(f"{technique}: saved {saved}; cost {cost}{mixed}")
    return [one_line(line) for line in lines]


def _is_of_an_epoch(found: Comparison, group: Group, metric: Metric) -> bool:
    """Whether a metric is the time of all that there is to read, where a token's is known, too."""
    return metric.field == "step_median_s" and found.reads_only(group) and found.is_known(group, "tokens_per_s")


class Ratio(NamedTuple):
    value: float
    gains: bool
    tells: bool
    """Whether it is a change at all."""


def ratios_of(found: Comparison, groups: Sequence[Group], technique: str, metric: Metric) -> list[Ratio]:
    """A metric's ratios to the reference, of each group where there is one."""
    ratios = []
    for group in groups:
        value = found.ratio(group, technique, metric.field)
        if value is None:
            continue
        gains = value < 1 if metric.better == "lower" else value > 1
        bound = bound_of_ratio(found, group, technique, metric, REFERENCE)
        is_chance = gains and metric.gains_by_chance and found.value(group, technique, "final_loss_nats") is not None
        tells = (
            abs(value - 1) > metric.same_within
            and not is_within_resolution(found, group, technique, metric)
            and bound != "~"
            and not (bound == "≤" and value > 1)
            and not (bound == "≥" and value < 1)
            and not is_chance
        )
        ratios.append(Ratio(value, gains, tells))
    return ratios


def _losses_of(found: Comparison, groups: Sequence[Group], technique: str, field: str) -> list[float]:
    losses = [found.lost(group, technique, field) for group in groups]
    return [loss for loss in losses if loss is not None]


def is_within_resolution(found: Comparison, group: Group, technique: str, metric: Metric) -> bool:
    """Whether a figure is no further from the reference's than either may be off."""
    values = [found.value(group, name, metric.field) for name in (technique, REFERENCE)]
    off = [found.resolution(group, name, metric.field) for name in (technique, REFERENCE)]
    return None not in values and abs((values[0] or 0) - (values[1] or 0)) < sum(off)


def _kind(gains: Sequence[bool]) -> str:
    return "saved" if all(gains) else "mixed" if any(gains) else "cost"
