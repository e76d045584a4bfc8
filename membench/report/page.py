"""A run as one page for a browser: pictures, a table, and all that stands behind them, with no address outside itself.

Everything that a suite or a record may name is hostile until it is escaped. Text goes into the page through a template
that escapes it, data for scripts through JSON in which no tag can end; whatever steers text (control characters, marks
of direction) is written out; and the page's own policy lets no script run but the two that are in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from membench.errors import MembenchError, one_line
from membench.host import console
from membench.protocol.case import Group
from membench.records.comparison import Comparison
from membench.records.metric import Metric
from membench.records.record import Record, metrics_in
from membench.records.run_file import Run
from membench.report import bars, broken_rules, cells, history, outcomes, pareto, savings, summary, text, timeline
from membench.report.table_formats import FORMATS
from membench.units import format_bytes, format_ratio, format_seconds

_FOLDER = Path(__file__).parent
_MARKS = {"ok": "✓", "skipped": "○"}


def page(runs: Sequence[Run], estimates: Run | None = None) -> str:
    """The page, as HTML.

    Args:
        estimates: estimates of cases of the runs, which are drawn beside what was measured.

    Raises:
        MembenchError: if the libraries that make it are not installed.
    """
    try:
        import jinja2
        import markupsafe
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MembenchError(f"a page needs {error.name}: pip install 'membench[report]'") from None

    def finalize(value: object) -> object:
        return value if isinstance(value, markupsafe.Markup) else one_line(str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, finalize=finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    library, script = get_plotlyjs(), (_FOLDER / "page.js").read_text(encoding="utf-8")
    compared = [Comparison(run.records) for run in runs]
    shown = _Shown(runs, compared, None if estimates is None else Comparison(estimates.records))
    return environment.get_template("page.html").render(
        title=", ".join(dict.fromkeys(str(run.header.get("suite")) for run in runs)),
        policy="; ".join((
            "default-src 'none'", f"script-src {_fingerprint(library)} {_fingerprint(script)}",
            "style-src 'unsafe-inline'", "img-src data:", "base-uri 'none'", "form-action 'none'",
        )),
        style=markupsafe.Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        library=markupsafe.Markup(library),
        script=markupsafe.Markup(script),
        data=markupsafe.Markup(console.without_commands(_json(shown.data()), FORMATS["json"].coded)),
        runs=[_told(run) for run in runs],
        how_to_read=summary.HOW_TO_READ,
        columns=shown.columns,
        has_stacks=shown.has_stacks,
        rows=shown.rows,
        groups=shown.groups,
        choices=shown.choices(),
        obtained=shown.obtained(),
        has_history=bool(shown.history),
    )  # fmt: skip


def _fingerprint(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_IN_A_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def _json(data: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(_plain(data), separators=(",", ":"), allow_nan=False).translate(_IN_A_SCRIPT)


def _plain(value: Any) -> Any:
    """What JSON has: no classes, no figure that is no number, no text that steers."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {one_line(str(key)): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _told(run: Run) -> dict[str, Any]:
    """A run in words: what it was, what came out, where it ran."""
    machine = run.header.get("machine") or {}
    return {
        "overview": summary.overview(run),
        "highlights": summary.highlights(run.records),
        "verdicts": savings.verdicts(run.records),
        "remarks": broken_rules.remarks(run),
        "name": run.header.get("run"),
        "suite": run.header.get("suite"),
        "suite_lines": str(run.header.get("suite_text", "")).splitlines(),
        "suite_sha256": run.header.get("suite_sha256"),
        "machine": list(_described({**machine, **_commits(run)})),
    }


def _commits(run: Run) -> dict[str, Any]:
    """The commits of a run by what they are of; of the code under test, why it is not known if it is not."""
    code, machine = run.header.get("code") or {}, run.header.get("machine") or {}
    told = summary.code_of(run) or code.get("reason")
    return {"code under test": told, "commit": None, "membench's commit": machine.get("commit")}


def _described(machine: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """A machine's description, a line each; what is not known is left out."""
    for name, value in machine.items():
        if isinstance(value, Mapping):
            yield from _described(value, f"{before}{name}: ")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                yield from _described(item, f"{before}{name} {number}: ")
        elif value is not None:
            shown = format_bytes(value) if name == "memory_bytes" and isinstance(value, int) else value
            label = "memory" if name == "memory_bytes" else name
            yield f"{before}{label}", ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)


@dataclass(frozen=True)
class _Cell:
    shown: str
    value: float | None
    reason: str


@dataclass(frozen=True)
class _Row:
    case: int
    group: int
    run: str
    model: str
    technique: str
    workload: str
    device: str
    status: str
    mark: str
    said: list[str]
    cells: list[_Cell]
    front_mark: str
    together: str


class _Group(NamedTuple):
    suite: str
    run: str
    """Which run it is of, where there are several."""
    found: Comparison
    group: Group


class _Shown:
    """What the page shows of several runs, by number: groups, their cases, and a row for each."""

    def __init__(self, runs: Sequence[Run], compared: Sequence[Comparison], estimates: Comparison | None) -> None:
        self._estimates = estimates
        self._several = len(runs) > 1
        self._groups = [
            _Group(str(run.header.get("suite")), self._label(run), found, group)
            for run, found in zip(runs, compared, strict=True)
            for group in found.groups
        ]
        self._metrics = metrics_in(record for run in runs for record in run.records)
        self.history = history.history(runs)
        self.columns = [
            metric for metric in self._metrics
            if metric.in_table and any(text.is_shown(found, group, metric) for _, _, found, group in self._groups)
        ]  # fmt: skip
        self._cases = [
            (number, technique)
            for number, (_, _, found, group) in enumerate(self._groups)
            for technique in found.techniques(group)
        ]
        self.has_stacks = any("+" in technique for _, technique in self._cases)
        self.groups = [" · ".join(filter(None, (label, *group))) for _, label, _, group in self._groups]
        marks = [text.front_marks(found, group) for _, _, found, group in self._groups]
        self.rows = [
            self._row(case, number, technique, marks[number].get(technique, ""))
            for case, (number, technique) in enumerate(self._cases)
        ]

    def _label(self, run: Run) -> str:
        """Which run it is, where there are several."""
        return f"{run.header.get('suite')} {summary.started(run)}".strip() if self._several else ""

    def _row(self, case: int, number: int, technique: str, front_mark: str) -> _Row:
        _, label, found, group = self._groups[number]
        repeats = found.repeats(group, technique)
        status = outcomes.status_of(repeats)
        together = found.interaction(group, technique, "peak_live_bytes") if "+" in technique else None
        said = dict.fromkeys(
            line
            for record in repeats
            for line in (
                *(() if record.status == "ok" else outcomes.said_of(record)[:1]),
                *record.broken_limits,
                *record.unchecked_limits,
            )
        )
        return _Row(
            case, number, label, group[0], found.title(group, technique), group[1], group[2], status,
            _MARKS.get(status.split(",")[0], "✗"),
            list(said), [self._cell(found, group, technique, metric) for metric in self.columns], front_mark,
            "" if together is None else format_ratio(together),
        )  # fmt: skip

    def _cell(self, found: Comparison, group: Group, technique: str, metric: Metric) -> _Cell:
        value = found.value(group, technique, metric.field)
        reasons = [record.reasons.get(metric.field) for record in found.repeats(group, technique)]
        reason = next((reason for reason in reasons if reason), "") if value is None else ""
        return _Cell(cells.figure(found, group, technique, metric), value, reason)

    def choices(self) -> list[tuple[str, str, list[str]]]:
        """Fields to filter by: the attribute of a row, what it is called, and its values."""
        fields = [("run", "run")] if self._several else []
        fields += [(name, name) for name in ("model", "workload", "device", "technique", "status")]
        return [(name, title, list(dict.fromkeys(getattr(row, name) for row in self.rows))) for name, title in fields]

    def obtained(self) -> list[tuple[Metric, list[tuple[str, int]]]]:
        """Of each metric, the ways in which it was obtained, and of how many records."""
        ways: dict[str, dict[str, int]] = {}
        for _, _, found, group in self._groups:
            for technique in found.techniques(group):
                for record in found.repeats(group, technique):
                    for field, how in record.obtained.items():
                        counts = ways.setdefault(field, {})
                        counts[_how(how)] = counts.get(_how(how), 0) + 1
        return [(metric, list(ways[metric.field].items())) for metric in self._metrics if metric.field in ways]

    def data(self) -> dict[str, Any]:
        """What the page's script draws."""
        ways: dict[str, int] = {}
        cases = [self._case(found, group, technique, number, ways) for number, technique in self._cases
                 for _, _, found, group in [self._groups[number]]]  # fmt: skip
        groups = [
            {
                "label": self.groups[number],
                "pareto": pareto.pareto(found, group),
                "memory": bars.memory(found, group, self._estimates),
                "conversion": bars.conversion(found, group),
                "breakdown": bars.breakdown(found, group),
                "ranks": bars.ranks(found, group),
                "history": self.history.get((suite, group), ()),
            }
            for number, (suite, _, found, group) in enumerate(self._groups)
        ]
        return {
            "groups": groups,
            "cases": cases,
            "noBreakdown": bars.NO_BREAKDOWN,
            "ways": list(ways),
            "metrics": [metric.title for metric in self._metrics],
        }

    def _case(
        self, found: Comparison, group: Group, technique: str, number: int, ways: dict[str, int]
    ) -> dict[str, Any]:
        """A case, whole: its timeline, every figure with how it was obtained or why it is not known."""
        repeats = found.repeats(group, technique)
        figures = []
        for index, metric in enumerate(self._metrics):
            how = _way(repeats, metric.field)
            if how is not None:
                shown = cells.figure(found, group, technique, metric)
                figures.append((index, shown, ways.setdefault(how, len(ways))))
        return {
            "group": number,
            "technique": found.title(group, technique),
            "status": outcomes.status_of(repeats),
            "said": list(dict.fromkeys(line for record in repeats for line in outcomes.said_of(record))),
            "output": [line for record in repeats for line in record.output_tail.splitlines()[-20:]],
            "took": format_seconds(sum(record.duration_s for record in repeats)),
            "repeats": len(repeats),
            "timeline": timeline.timeline(repeats[0], len(repeats)),
            "figures": figures,
        }


def _way(repeats: Sequence[Record], field: str) -> str | None:
    """How a figure was obtained, or why it is not known; ``None`` where it has no meaning for the case."""
    for record in repeats:
        if field in record.obtained:
            return _how(record.obtained[field])
    return next((f"not known: {record.reasons[field]}" for record in repeats if field in record.reasons), None)


def _how(obtained: Mapping[str, Any]) -> str:
    parts = [str(obtained.get("source", "source not recorded")), str(obtained.get("bound", "exact"))]
    if obtained.get("at_least_bytes") is not None:
        parts.append("how far below is in the record")
    if obtained.get("resolution_bytes"):
        parts.append(f"to within {format_bytes(obtained['resolution_bytes'])}")
    if obtained.get("interval_s"):
        parts.append(f"every {format_seconds(obtained['interval_s'])}")
    if "children" in obtained:
        parts.append("children in it" if obtained["children"] else "children not in it")
    return "; ".join(parts)
