"""What became of each case, as every CI service knows it: passed, failed, not finished, skipped; and in what words."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from membench.records.record import Record, Status
from membench.regression.verdict import Judgement
from membench.suite.gates import Outcome

End = Literal["passed", "skipped", "failed", "unfinished"]
"""``failed``: measured, and a limit, a rule or a tolerance is broken. ``unfinished``: not measured to its end, or not
comparable."""
_WORST_LAST: tuple[End, ...] = ("passed", "skipped", "failed", "unfinished")


@dataclass(frozen=True)
class CheckedCase:
    """A case and what is to be said of it.

    Attributes:
        reasons: why it did not pass, or was skipped; a line each.
        notes: what is worth knowing although it breaks nothing.
        duration_s: of all its repeats; ``None`` where it was not measured here.
        output: the end of what it printed, where it did not end well.
        undecided: what looks worse and may be chance, a line each; it fails nothing.
    """

    suite: str
    id: str
    end: End
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    duration_s: float | None = None
    output: str = ""
    undecided: tuple[str, ...] = ()


_ENDS: Mapping[str, End] = {"skipped": "skipped", "diverged": "failed"}


def of_records(
    suite: str,
    records: Sequence[Record],
    outcomes: Iterable[Outcome] = (),
    ends: Mapping[str, End] = _ENDS,
    *,
    idle_limits: Sequence[str] = (),
    allows_skipped: bool = False,
) -> list[CheckedCase]:
    """The cases of a run, with the limits and rules of its suite.

    Args:
        outcomes: of the suite's rules.
        ends: what a status other than ``ok`` stands for; ``unfinished`` where it is not said.
        idle_limits: a sentence for each limit on a metric that no case has.
        allows_skipped: whether limits and rules may be left unchecked; else the cases of these are unfinished.

    Returns:
        the cases, and one more for what was to be checked and fits none of them.
    """
    broken: dict[str, list[str]] = {}
    unchecked: dict[str, list[str]] = {record.id: list(record.unchecked_limits) for record in records}
    for outcome in outcomes:
        told = broken if outcome.holds is False else unchecked if outcome.is_unchecked else None
        if told is not None:
            told.setdefault(outcome.case_id, []).append(_of(outcome.case_id, outcome.sentence()))
    cases = [
        _of_repeats(suite, case_id, repeats, broken.get(case_id, []), ends) for case_id, repeats in _by_id(records)
    ]
    ids = {case.id for case in cases}
    of_none = [*idle_limits, *(line for match, lines in unchecked.items() if match not in ids for line in lines)]
    end: End = "skipped" if allows_skipped else "unfinished"
    rules = [CheckedCase(suite, "limits and gates", end, tuple(dict.fromkeys(of_none)))] if of_none else []
    return rules + [
        dataclasses.replace(
            case,
            end=case.end if allows_skipped else _worst((case.end, "unfinished")),
            reasons=tuple(dict.fromkeys((*case.reasons, *unchecked[case.id]))),
        )
        if unchecked[case.id]
        else case
        for case in cases
    ]


def _by_id(records: Sequence[Record]) -> Iterable[tuple[str, list[Record]]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.id, []).append(record)
    return found.items()


def _of_repeats(
    suite: str, case_id: str, repeats: Sequence[Record], rules: Sequence[str], ends: Mapping[str, End]
) -> CheckedCase:
    found: list[End] = ["failed"] if rules else []
    reasons = list(rules)
    for record in repeats:
        if record.status == "ok":
            found.append("failed" if record.broken_limits else "passed")
        else:
            found.append(ends.get(record.status, "unfinished"))
            where = f" in {record.ended_in}" if record.ended_in else ""
            reasons.append(f"{record.status}{where}: {record.message}")
        reasons += record.broken_limits
    return CheckedCase(
        suite,
        case_id,
        _worst(found),
        tuple(dict.fromkeys(reasons)),
        tuple(dict.fromkeys(note for record in repeats for note in (*record.remarks, *record.notes))),
        sum(record.duration_s for record in repeats),
        "".join(record.output_tail for record in repeats),
    )


def of_judgement(judgement: Judgement) -> list[CheckedCase]:
    """The cases of a comparison; where it is not of cases that it fails, one of the comparison itself."""
    suite, missing = judgement.new.suite or judgement.base.suite, set(judgement.missing)
    cases = []
    for pair in judgement.pairs:
        told: dict[str, list[str]] = {}
        for change in pair.changes:
            if change.is_watched:
                told.setdefault(change.verdict, []).append(_of(pair.id, change.sentence()))
        reasons = told.get("regressed", [])
        end: End = "failed" if reasons else "passed"
        if pair.broke:
            name = judgement.base.name
            how = f"it ended well in {name}, and now" if pair.base else f"it is not in {name}, and ended badly"
            end, reasons = "unfinished", [f"{how}: {pair.broke}", *reasons]
        elif pair.id in missing:
            end, reasons = "unfinished", [f"it was measured in {judgement.base.name}, and was not now"]
        not_judged = [f"not judged: {sentence}" for sentence in told.get("not judged", [])]
        cases.append(
            CheckedCase(
                suite,
                pair.id,
                end,
                tuple(reasons),
                (*not_judged, *told.get("better", [])),
                undecided=tuple(told.get("undecided", [])),
            )
        )
    if judgement.exit_code and not any(case.end in ("failed", "unfinished") for case in cases):
        cases.append(CheckedCase(suite, "comparison", "unfinished", tuple(judgement.sentences())))
    return cases


def _of(case_id: str, sentence: str) -> str:
    """A sentence that stands with its case, which it need not name."""
    return sentence.removeprefix(f"{case_id}: ")


def of_check(
    judgement: Judgement,
    records: Sequence[Record],
    outcomes: Iterable[Outcome] = (),
    *,
    idle_limits: Sequence[str] = (),
    allows_skipped: bool = False,
) -> list[CheckedCase]:
    """The cases of a comparison whose new side was measured here: with the limits and rules of its suite, too.

    How a case ended is judged by how it ended in the base. One that ended no better there fails nothing: it is told as
    skipped.
    """
    ends: Mapping[str, End] = dict.fromkeys(typing.get_args(Status), "skipped")
    checked = of_records(
        judgement.new.suite, records, outcomes, ends, idle_limits=idle_limits, allows_skipped=allows_skipped
    )
    return together(checked, of_judgement(judgement))


def together(first: Sequence[CheckedCase], second: Sequence[CheckedCase]) -> list[CheckedCase]:
    """Two checks of the same cases as one: of each the worse end, and all that is to be said."""
    merged = {case.id: case for case in first}
    for case in second:
        other = merged.get(case.id, case)
        merged[case.id] = CheckedCase(
            case.suite,
            case.id,
            _worst((other.end, case.end)),
            tuple(dict.fromkeys((*other.reasons, *case.reasons))),
            tuple(dict.fromkeys((*other.notes, *case.notes))),
            other.duration_s if case.duration_s is None else case.duration_s,
            other.output or case.output,
            tuple(dict.fromkeys((*other.undecided, *case.undecided))),
        )
    return list(merged.values())


def _worst(ends: Sequence[End]) -> End:
    return max(ends, key=_WORST_LAST.index)
