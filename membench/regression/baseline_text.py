"""The text of a baseline's file, written so that a diff can be reviewed, and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from membench.errors import ResultsError
from membench.records import strict_json
from membench.records.metrics import METRICS, known_metric
from membench.records.validation import shown
from membench.regression.baseline_checks import refuse_impossible
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.noise import Noise

SCHEMA_VERSION = 3
"""History: 1, the first. 2 adds the device of each case, and the median of noise beside its range, since the noise of a
time is taken as a share of it. 3 adds the commit of the code that was measured."""
_DIGITS_OF_TIMES = 4
_DIGITS = 7
_WIDTH = 110
_KEPT_SAMPLES = tuple(metric.field for metric in METRICS if metric.keeps_samples)


def encoded(measured: Measured) -> str:
    """Return the text of a baseline's file: keys sorted, a line a figure, so that a diff shows which figure changed."""
    content = {
        "schema": SCHEMA_VERSION,
        "name": measured.name,
        "suite": measured.suite,
        "measured_at": measured.measured_at,
        "machine": dict(measured.machine),
        **({"code": dataclasses.asdict(measured.code)} if measured.code else {}),
        "cases": {case_id: _folded(case) for case_id, case in sorted(measured.cases.items())},
        "noise": _spreads(measured.noise),
    }
    return "\n".join(_lines(content, "")) + "\n"


def _folded(case: MeasuredCase) -> dict[str, Any]:
    fields = {
        key: value for key, value in dataclasses.asdict(case).items() if key != "id" and value not in ({}, (), [], None)
    }
    for kept in ("values", "samples"):
        if kept in fields:
            fields[kept] = {name: _rounded(name, values) for name, values in fields[kept].items()}
    if fields.get("waited_s"):
        fields["waited_s"] = _rounded("waited_s", fields["waited_s"])
    if "resolution_bytes" in fields:
        by_size: dict[str, list[str]] = {}
        for name, size in sorted(fields["resolution_bytes"].items()):
            by_size.setdefault(str(size), []).append(name)
        fields["resolution_bytes"] = by_size
    # Rates can be derived from the durations of the same steps.
    if "samples" in fields:
        fields["samples"] = {name: each for name, each in fields["samples"].items() if name in _KEPT_SAMPLES}
    return fields


def _rounded(name: str, values: Any) -> Any:
    """Round times to their significant digits, so that files stay small and their diffs readable."""
    if isinstance(values, list | tuple):
        return [_rounded(name, value) for value in values]
    if isinstance(values, int) or not values:
        return values
    metric = known_metric(name)
    is_time = metric is None or metric.unit.counts in ("seconds", "per second")
    return float(f"{values:.{_DIGITS_OF_TIMES if is_time else _DIGITS}g}")


def _spreads(noise: Noise) -> dict[str, Any]:
    """Return the spreads of the noise, without those of zero, which say nothing."""
    found = {
        case_id: {
            name: {
                "runs": spread.runs,
                "range": _rounded(name, spread.range),
                "median": _rounded(name, spread.median) if spread.median is not None else None,
            }
            for name, spread in spreads.items()
            if spread.range
        }
        for case_id, spreads in sorted(noise.spreads.items())
    }
    return {case_id: spreads for case_id, spreads in found.items() if spreads}


def _lines(value: Any, indent: str, before: str = "", after: str = "") -> Iterator[str]:
    """Yield JSON with a line per entry; an entry that fits a line stays on it."""
    flat = json.dumps(value, sort_keys=True, allow_nan=False)
    opens = isinstance(value, Mapping | list | tuple) and value
    if not opens or (_is_flat(value) and len(indent) + len(before) + len(flat) <= _WIDTH):
        yield f"{indent}{before}{flat}{after}"
        return
    is_table = isinstance(value, Mapping)
    entries = (
        [(f"{json.dumps(key)}: ", inner) for key, inner in (value.items() if not indent else sorted(value.items()))]
        if is_table
        else [("", inner) for inner in value]
    )
    yield f"{indent}{before}{'{' if is_table else '['}"
    for number, (key, inner) in enumerate(entries, 1):
        yield from _lines(inner, indent + "  ", key, "," if number < len(entries) else "")
    yield f"{indent}{'}' if is_table else ']'}{after}"


def _is_flat(value: Any) -> bool:
    """Whether a diff can show a value on one line: numbers, or a few facts."""
    if isinstance(value, Mapping):
        return len(value) <= 3 and not any(isinstance(inner, Mapping) for inner in value.values())
    return not any(isinstance(inner, Mapping) for inner in value)


def decoded(text: bytes) -> Measured:
    """Read the text of a baseline's file, of this schema or an earlier one.

    Raises:
        ResultsError: in one line, if it is not a baseline, is damaged or of a newer schema.
    """
    parsed = strict_json.parsed(text)
    if not isinstance(parsed, dict) or type(parsed.get("schema")) is not int or "cases" not in parsed:
        raise ResultsError("no baseline ('schema' or 'cases' is missing)")
    schema = parsed.pop("schema")
    if schema > SCHEMA_VERSION:
        raise ResultsError(f"schema {shown(schema)} is newer than {SCHEMA_VERSION}; a newer membench reads it")
    if schema < 1:
        raise ResultsError(f"there is no schema {shown(schema)}")
    unfolded = _unfolded(parsed)
    if schema == 1:
        _say_devices(unfolded)
    try:
        measured = TypeAdapter(Measured).validate_json(json.dumps(unfolded))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultsError(f"damaged: {shown(place)}: {first['msg'].lower()}") from None
    refuse_impossible(measured)
    return dataclasses.replace(measured, noise=_with_medians(measured)) if schema == 1 else measured


def _unfolded(parsed: dict[str, Any]) -> dict[str, Any]:
    """Convert the file's layout to that of the classes: in a file, a case does not repeat its id, nor noise its key."""
    cases = parsed["cases"]
    if isinstance(cases, dict):
        parsed["cases"] = {case_id: _unfolded_case(case_id, case) for case_id, case in cases.items()}
    parsed["noise"] = {"spreads": parsed.get("noise", {})}
    return parsed


def _unfolded_case(case_id: str, case: Any) -> Any:
    if not isinstance(case, dict):
        return case
    sizes = case.get("resolution_bytes", {})
    if isinstance(sizes, dict) and all(size.isdecimal() and isinstance(names, list) for size, names in sizes.items()):
        case["resolution_bytes"] = {str(name): int(size) for size, names in sizes.items() for name in names}
    return {"id": case_id, **case}


def _say_devices(unfolded: dict[str, Any]) -> None:
    """Add the devices, which schema 1 had only in the ids of cases."""
    cases = unfolded["cases"] if isinstance(unfolded["cases"], dict) else {}
    for case_id, case in cases.items():
        if isinstance(case, dict):
            named = case_id.rpartition("/")[2]
            case["device"] = named if named.startswith("cuda") else "cpu"


def _with_medians(measured: Measured) -> Noise:
    """Return the noise of a file of schema 1, with the values of the cases in place of the missing medians."""
    return Noise(
        {
            case_id: {
                name: dataclasses.replace(spread, median=case.value(name)) if case else spread
                for name, spread in spreads.items()
            }
            for case_id, spreads in measured.noise.spreads.items()
            for case in [measured.cases.get(case_id)]
        }
    )
