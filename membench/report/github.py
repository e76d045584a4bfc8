"""What GitHub Actions shows of checked cases: annotations in the log, and the text of a job summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from membench.errors import one_line
from membench.report import markdown
from membench.report.case_outcomes import CheckedCase, End

_LEVELS: dict[End, str] = {"failed": "error", "unfinished": "error"}
_LARGEST_SUMMARY_BYTES = 1_000_000  # GitHub drops a step's summary above 1 MiB


def workflow_commands(cases: Sequence[CheckedCase]) -> Iterator[str]:
    """A workflow command for each case that failed, and one for each of which something is undecided."""
    for case in cases:
        title = _property(f"membench: {case.id}")
        if case.end in _LEVELS:
            yield f"::{_LEVELS[case.end]} title={title}::{'%0A'.join(map(_data, case.reasons))}"
        if case.undecided:
            yield f"::warning title={title}::{'%0A'.join(_data(f'undecided: {doubt}') for doubt in case.undecided)}"


def summary(heading: str, cases: Sequence[CheckedCase], tables: Sequence[str]) -> str:
    """Markdown: what failed and why, what is undecided, then the tables.

    Args:
        tables: in Markdown already; they are left out from the last on where there is no room.
    """
    failed = [case for case in cases if case.end in _LEVELS]
    skipped = sum(case.end == "skipped" for case in cases)
    undecided = sum(bool(case.undecided) for case in cases)
    counts = [
        f"{len(cases) - len(failed) - skipped} passed", f"{len(failed)} failed", f"{skipped} skipped",
        f"{undecided} of them undecided",
    ]  # fmt: skip
    said = ", ".join(count for count in counts if not count.startswith("0 ")) or "no cases"
    lines = [f"## {'❌' if failed else '✅'} {markdown.escaped(heading)}: {said}", ""]
    lines += [
        f"- {markdown.escaped(case.id)}: {markdown.escaped(reason)}" for case in failed for reason in case.reasons
    ]
    lines += [
        f"- {markdown.escaped(case.id)}: undecided: {markdown.escaped(doubt)}"
        for case in cases
        for doubt in case.undecided
    ]
    size = len("\n".join(lines).encode())
    for table in tables:
        size += len(table.encode()) + 2
        if size > _LARGEST_SUMMARY_BYTES:
            lines += ["", "The other tables are longer than a summary may be; see the log."]
            break
        lines += ["", table]
    return "\n".join(lines).encode()[:_LARGEST_SUMMARY_BYTES].decode(errors="ignore") + "\n"


def _data(text: str) -> str:
    """What stands behind the second pair of colons."""
    return one_line(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
