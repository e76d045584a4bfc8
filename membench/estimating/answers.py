"""The answers of ``membench fit`` as text."""

from __future__ import annotations

import collections
from collections.abc import Iterator

from membench.estimating.fit import Fit, Outcome
from membench.estimating.stacks import VARIANTS
from membench.estimating.why import Why
from membench.report.table_formats import DEFAULT, FORMATS
from membench.units import format_bytes

_MOST_KNOWN = 6
_NEAR = 3


def table(found: Fit, form: str = DEFAULT, most: int | None = None) -> str:
    """A row a stack: those that fit, best first, then those that need least of the others.

    Args:
        most: how many to show; ``None``: all, also those that do not fit and those of which nothing is known.
    """
    style = FORMATS[form]
    shown = list(found.outcomes)
    if most is not None:
        others = [each for each in found.outcomes if each.verdict == "too large"]
        shown = [*found.fitting[:most], *others[: _NEAR if found.fitting else most]]
    if style.is_flat:
        return style.render([_flat(found, each) for each in shown])
    return style.render([_row(found, each, form) for each in shown])


def _row(found: Fit, outcome: Outcome, form: str) -> dict[str, str]:
    left = found.left_bytes(outcome)
    title = "largest batch" if found.free == "batch" else "largest context"
    largest = "" if outcome.largest is None else f"{'≥ ' if outcome.is_at_least else ''}{outcome.largest:,}"
    return {
        "stack": FORMATS[form].cell(outcome.stack),
        "verdict": outcome.verdict,
        "needs a device": _needed(outcome),
        "left": "–" if left is None else f"{'−' if left < 0 else ''}{format_bytes(abs(left))}",
        "peak in": outcome.part or "–",
        title: largest or "–",
        "obtained": FORMATS[form].cell(_how(outcome)),
    }


def _needed(outcome: Outcome) -> str:
    if outcome.needed_bytes is None:
        return "–"
    return f"{'≥ ' if outcome.how.startswith('arithmetic') else '≈'}{format_bytes(outcome.needed_bytes)}"


def _how(outcome: Outcome) -> str:
    if outcome.reason is not None:
        return outcome.reason
    if outcome.how.startswith("arithmetic"):
        return outcome.how
    _, _, extrapolated = outcome.how.partition("extrapolated ")
    return f"traced {extrapolated}" if extrapolated else "traced, all layers"


def _flat(found: Fit, outcome: Outcome) -> dict[str, object]:
    return {
        "stack": outcome.stack,
        "verdict": outcome.verdict,
        "needed_bytes": outcome.needed_bytes,
        "left_bytes": found.left_bytes(outcome),
        "part": outcome.part,
        f"largest_{found.free}": outcome.largest,
        "how": _how(outcome),
    }


def remarks(found: Fit, *, has_runs: bool) -> Iterator[str]:
    """Yield lines on the question, what is known of the best stacks, and what was not tried."""
    yield f"{found.model}: {_question(found)}"
    yield _memory(found)
    counts = collections.Counter(each.verdict for each in found.outcomes)
    yield (
        f"{len(found.outcomes)} stacks in {found.searched_s:.0f} s, {found.seconds:.0f} s in all: {counts['fits']} fit,"
        f" {counts['too large']} are too large, {counts['unknown']} cannot be applied or estimated"
    )
    shown: set[str] = set()
    for outcome in found.fitting[:_MOST_KNOWN]:
        for member in outcome.stack.split("+"):
            if member in VARIANTS and member not in shown:
                plugin = VARIANTS[member]
                options = ", ".join(f"{name} = {_toml(value)}" for name, value in plugin.options.items())
                yield f"{member}: '{plugin.use}' with {options}"
            shown.add(member)
        for name, costs in outcome.known.items():
            if f"known {name}" not in shown:
                yield f"{name}: {'; '.join(dict.fromkeys(str(cost) for cost in costs[:2]))}"
            shown.add(f"known {name}")
    unknown = [each.stack for each in found.fitting[:_MOST_KNOWN] if not each.known]
    if not has_runs:
        yield "what they cost in quality and speed is not known: there are no kept runs (--runs FOLDER)"
    elif unknown:
        yield f"no kept run knows what they cost in quality and speed: {', '.join(unknown)}"
    yield f"not tried: {found.not_tried}"
    yield "not counted: loading, converting and saving; fragmentation; kernels' own working memory"


def _question(found: Fit) -> str:
    work = found.workload
    unit = "prompt and reply" if work.kind == "generate" else "a sequence"
    return f"{work.kind}, {work.batch_size} rows over all devices, {work.length:,} tokens {unit}"


def _memory(found: Fit) -> str:
    budget = found.budget
    devices = f"{budget.count} × {budget.name}" if budget.count > 1 else budget.name
    if not budget.overhead_bytes:
        return f"{devices}: {format_bytes(budget.usable_bytes)} a device"
    besides = "the context and NCCL's buffers" if budget.count > 1 else "the context"
    return (
        f"{devices}: {format_bytes(budget.usable_bytes)} a device ({budget.source}), less"
        f" {format_bytes(budget.overhead_bytes)} for {besides}"
    )


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def breakdown(found: Why, form: str = DEFAULT) -> str:
    """A row a part of the step: its peak, and what is alive then."""
    style = FORMATS[form]
    categories = list(dict.fromkeys(each for held in found.breakdown_bytes.values() for each in held))
    rows: list[dict[str, object]] = []
    for part, peak in found.peaks_bytes.items():
        held = found.breakdown_bytes.get(part, {})
        sizes = {each: held.get(each, 0) for each in categories}
        if style.is_flat:
            rows.append({"part": part, "peak_bytes": peak, **{f"{each}_bytes": size for each, size in sizes.items()}})
        else:
            cells = {each: format_bytes(size) if size else "–" for each, size in sizes.items()}
            rows.append({"part": part, "peak": format_bytes(peak), **cells})
    return style.render(rows)


def reasons(found: Why) -> Iterator[str]:
    """Yield lines that say whether a stack fits, what is largest at its peak, and what would help."""
    budget, left = found.budget, found.left_bytes
    verdict = (
        f"fits, {format_bytes(left)} are left" if left >= 0 else f"does not fit, {format_bytes(-left)} are missing"
    )
    yield (
        f"{found.stack} {verdict}; it needs {format_bytes(found.needed_bytes)} in {found.part or 'a step'}, and"
        f" {format_bytes(budget.per_device_bytes)} can be used of each {budget.name}"
    )
    held = found.breakdown_bytes.get(found.part or "", {})
    largest = sorted(held.items(), key=lambda each: -each[1])[:4]
    if largest:
        yield "most of it is " + ", ".join(f"{category} {format_bytes(size)}" for category, size in largest if size > 0)
    for name, size in list(found.neighbours_bytes.items())[:_MOST_KNOWN]:
        says = "fits" if size <= budget.per_device_bytes else "is still too large"
        yield f"with {name} it is {format_bytes(size)}: {says}"
    if not found.neighbours_bytes:
        yield "no stack that was tried and differs by one technique needs less"
