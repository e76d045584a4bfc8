"""Baselines on disk: small JSON files that can be reviewed in a diff."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from membench.errors import ResultsError, did_you_mean
from membench.records import strict_json
from membench.records.metrics import METRICS, can_be_a_figure, known_metric
from membench.records.names import checked_device, checked_name
from membench.records.schema import check_machine
from membench.records.validation import shown
from membench.regression.machines import Difference, differences, machine_class
from membench.regression.measured import Measured, MeasuredCase, is_duration_of_a_step
from membench.regression.noise import Noise
from membench.units import format_bytes

SCHEMA_VERSION = 2
"""History: 1, the first. 2 says on which device each case ran, and of noise the median beside the range: that of a time
is taken as a share."""

FOLDER = Path("results") / "baselines"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79}(@[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79})?")
_DIGITS_OF_TIMES = 4
_DIGITS = 7
_LARGEST = 2.0**63
_LARGEST_FILE_BYTES = 2**26
_WIDTH = 110


def default_name(measured: Measured) -> str:
    """``SUITE@MACHINE-CLASS``."""
    return f"{measured.suite}@{machine_class(measured.machine, measured.on_gpu)}"


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """Where a baseline of this name lies: ``FOLDER/NAME.json``.

    Raises:
        ResultsError: if it is no name: letters, digits, '.', '_', '-' and one '@', and nothing that leads elsewhere.
    """
    if not is_name(name):
        raise ResultsError(
            f"{shown(name)} is no name for a baseline: it has letters, digits, '.', '_', '+', '-' and one '@',"
            " such as 'quickstart@2-cores-epyc'"
        )
    return folder / f"{name}.json"


def is_name(name: str) -> bool:
    """Whether a baseline may be called so."""
    return _NAME.fullmatch(name) is not None


def write(measured: Measured, path: Path) -> None:
    """Keep a measurement as a baseline, whole or not at all.

    Raises:
        ResultsError: if it cannot be written, or no case of it ended well.
    """
    if not any(case.is_measured for case in measured.cases.values()):
        raise ResultsError(f"{measured.name}: no case of it ended well; that is no baseline")
    text = _text(dataclasses.replace(measured, name=path.stem))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".draft")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror}") from None


def write_anew(measured: Measured, path: Path) -> None:
    """Keep a measurement in place of the baseline that may be there; what that knows of this machine's noise stays.

    Raises:
        ResultsError: as ``write``; if what is there is no baseline.
    """
    if path.is_file():
        measured = dataclasses.replace(measured, noise=_noise(read(path), measured))
    write(measured, path)


class Kept(NamedTuple):
    """What a baseline holds after cases were put into it, and how many of it are as before."""

    baseline: Measured
    stay: int


def write_into(measured: Measured, path: Path) -> Kept:
    """Keep a measurement in the baseline that may be there: a case that was not measured to its end this time stays as
    it was, and so does one that was not measured at all.

    Raises:
        ResultsError: as ``write``; if what is there is no baseline, or what would stay of it is of another machine.
    """
    new = {case_id: case for case_id, case in measured.cases.items() if case.is_measured}
    stays: dict[str, MeasuredCase] = {}
    if path.is_file():
        kept = read(path)
        stays = {
            case_id: case
            for case_id, case in kept.cases.items()
            if case_id not in new and (case.is_measured or case_id not in measured.cases)
        }
        if not new:
            return Kept(kept, len(stays))
        if stays and (unlike := _unlike(kept, measured)):
            many = len(stays) > 1
            raise ResultsError(
                f"{path}: {len(stays)} {'cases' if many else 'case'} of it would stay, and {'are' if many else 'is'} of"
                f" another machine ({unlike[0]}); 'membench baseline remove {path.stem}' begins anew"
            )
        cases = {**measured.cases, **stays, **new}
        measured = dataclasses.replace(measured, cases=cases, noise=_noise(kept, measured))
    write(measured, path)
    return Kept(measured, len(stays))


def _noise(kept: Measured, new: Measured) -> Noise:
    """What is known of the noise of the machine of a new measurement."""
    return new.noise if _unlike(kept, new) else kept.noise | new.noise


def _unlike(kept: Measured, new: Measured) -> list[Difference]:
    on_gpu = any(case.on_gpu for case in (*kept.cases.values(), *new.cases.values()))
    return [each for each in differences(kept.machine, new.machine) if each.bars(on_gpu)]


def read(path: Path) -> Measured:
    """Read a baseline.

    Raises:
        ResultsError: in one line, if it is none, is damaged or of a newer schema.
    """
    try:
        with strict_json.open_file(path) as file:
            text = file.read(_LARGEST_FILE_BYTES + 1)
        if len(text) > _LARGEST_FILE_BYTES:
            raise ResultsError(f"larger than any baseline: more than {format_bytes(_LARGEST_FILE_BYTES)}")
        parsed = strict_json.parsed(text)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    if not isinstance(parsed, dict) or type(parsed.get("schema")) is not int or "cases" not in parsed:
        raise ResultsError(f"{path}: no baseline ('schema' or 'cases' is missing)")
    schema = parsed.pop("schema")
    if schema > SCHEMA_VERSION:
        raise ResultsError(f"{path}: schema {shown(schema)} is newer than {SCHEMA_VERSION}; a newer membench reads it")
    if schema < 1:
        raise ResultsError(f"{path}: there is no schema {shown(schema)}")
    unfolded = _unfolded(parsed)
    if schema == 1:
        _say_devices(unfolded)
    try:
        measured = TypeAdapter(Measured).validate_json(json.dumps(unfolded))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path}: damaged: {shown(place)}: {first['msg'].lower()}") from None
    _refuse_impossible(measured, path)
    if schema == 1:
        measured = dataclasses.replace(measured, noise=_with_medians(measured))
    return dataclasses.replace(measured, name=path.stem)  # whoever renames a file renames the baseline


def names(folder: Path = FOLDER) -> list[str]:
    """The baselines that lie in a folder."""
    try:
        return sorted(path.stem for path in folder.glob("*.json") if is_name(path.stem) and path.is_file())
    except OSError as error:
        raise ResultsError(f"{folder}: cannot be read: {error.strerror}") from None


def named(name: str, folder: Path = FOLDER) -> Measured:
    """Read a baseline by its name.

    Raises:
        ResultsError: as ``read``; if there is none of this name, with the nearest one.
    """
    path = path_of(name, folder)
    if not path.is_file():
        raise _none_of(name, folder)
    return read(path)


def _none_of(name: str, folder: Path) -> ResultsError:
    return ResultsError(f"{folder}: no baseline is named {shown(name)}; {did_you_mean(name, names(folder))}")


def remove(name: str, folder: Path = FOLDER) -> None:
    """Remove a baseline.

    Raises:
        ResultsError: if there is none of this name.
    """
    path = path_of(name, folder)
    try:
        path.unlink()
    except FileNotFoundError:
        raise _none_of(name, folder) from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be removed: {error.strerror}") from None


def _refuse_impossible(measured: Measured, path: Path) -> None:
    """What fits the schema and is still nothing that was measured."""
    try:
        check_machine(measured.machine)
        if measured.suite:  # what was measured without one has none
            checked_name(measured.suite)
    except ResultsError as error:
        raise ResultsError(f"{path}: damaged: machine.{error}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: damaged: suite = {shown(measured.suite)}: {error}") from None
    for case_id, case in measured.cases.items():
        if case_id != case.id or not case_id.isprintable():
            raise ResultsError(f"{path}: damaged: case {shown(case_id)} calls itself {shown(case.id)}")
        if case.is_measured and not case.values:
            raise ResultsError(f"{path}: damaged: case {shown(case_id)} ended well and has no figures")
        steps = [len(repeat) for repeat in case.samples.get("step_median_s", ())]
        if case.waited_s and [len(repeat) for repeat in case.waited_s] != steps:
            raise ResultsError(f"{path}: damaged: cases.{case_id}.waited_s is not of the steps in samples")
        try:
            checked_device(case.device)
        except ValueError as error:
            raise ResultsError(f"{path}: damaged: cases.{case_id}.device = {shown(case.device)}: {error}") from None
        if wrong := _impossible(case):
            raise ResultsError(f"{path}: damaged: cases.{case_id}.{wrong} holds nothing that was measured")
        for name, values in case.values.items():
            if not values or not all(can_be_a_figure(name, value) for value in values):
                raise ResultsError(f"{path}: damaged: cases.{case_id}.values.{name} holds nothing that was measured")
    for case_id, spreads in measured.noise.spreads.items():
        for name, spread in spreads.items():
            told = (spread.range, spread.median or 0)
            if spread.runs < 2 or spread.range < 0 or not all(can_be_a_figure(name, one) for one in told):
                raise ResultsError(f"{path}: damaged: noise.{case_id}.{name} is no spread of two runs or more")


def _impossible(case: MeasuredCase) -> str | None:
    """Which field of a case no measurement can have led to, if one has not."""
    modules = case.modules or ()
    sizes = {
        "resolution_bytes": case.resolution_bytes.values(),
        "breakdown_bytes": (size for of_part in case.breakdown_bytes.values() for size in of_part.values()),
        "modules": (number for each in modules for number in (each.bytes, each.count)),
        "phases": (size for of_phase in case.phases.values() for size in of_phase.values()),
    }
    for name, found in sizes.items():
        if any(abs(size) > _LARGEST for size in found):
            return name
    if any(each.count < 1 for each in modules):
        return "modules"
    if any(not {"peak_live_bytes", "held_live_bytes"} <= set(of_phase) for of_phase in case.phases.values()):
        return "phases"
    for name, repeats in case.samples.items():
        if not repeats or any(not repeat or not all(map(is_duration_of_a_step, repeat)) for repeat in repeats):
            return f"samples.{name}"
    return None


def _unfolded(parsed: dict[str, Any]) -> dict[str, Any]:
    """From the file's shape to that of the classes: a case does not repeat its id, nor the noise its one key."""
    cases = parsed["cases"]
    if isinstance(cases, dict):
        parsed["cases"] = {case_id: _unfolded_case(case_id, case) for case_id, case in cases.items()}
    parsed["noise"] = {"spreads": parsed.get("noise", {})}
    return parsed


def _say_devices(unfolded: dict[str, Any]) -> None:
    """What schema 1 left to the ids of a suite's cases."""
    cases = unfolded["cases"] if isinstance(unfolded["cases"], dict) else {}
    for case_id, case in cases.items():
        if isinstance(case, dict):
            named = case_id.rpartition("/")[2]
            case["device"] = named if named.startswith("cuda") else "cpu"


def _with_medians(measured: Measured) -> Noise:
    """The noise of a file of schema 1: the figures that are kept stand for the medians that are not."""
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


def _unfolded_case(case_id: str, case: Any) -> Any:
    if not isinstance(case, dict):
        return case
    sizes = case.get("resolution_bytes", {})
    if isinstance(sizes, dict) and all(size.isdecimal() and isinstance(names, list) for size, names in sizes.items()):
        case["resolution_bytes"] = {str(name): int(size) for size, names in sizes.items() for name in names}
    return {"id": case_id, **case}


def _text(measured: Measured) -> str:
    """Keys sorted, a line a figure, so that a diff shows which figure of which case has moved."""
    content = {
        "schema": SCHEMA_VERSION,
        "name": measured.name,
        "suite": measured.suite,
        "measured_at": measured.measured_at,
        "machine": dict(measured.machine),
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
    # Rates follow from the durations of the same steps.
    if "samples" in fields:
        fields["samples"] = {name: each for name, each in fields["samples"].items() if name in _KEPT_SAMPLES}
    return fields


_KEPT_SAMPLES = tuple(metric.field for metric in METRICS if metric.keeps_samples)


def _rounded(name: str, values: Any) -> Any:
    """Times to as many digits as mean something, so that a file is small and its diffs are readable."""
    if isinstance(values, list | tuple):
        return [_rounded(name, value) for value in values]
    if isinstance(values, int) or not values:
        return values
    metric = known_metric(name)
    is_time = metric is None or metric.unit.counts in ("seconds", "per second")
    return float(f"{values:.{_DIGITS_OF_TIMES if is_time else _DIGITS}g}")


def _spreads(noise: Noise) -> dict[str, Any]:
    """A spread of nothing says no more than none."""
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
    """JSON with a line an entry, where an entry that fits a line stays on it."""
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
    """Whether a diff can show it on one line: numbers, a few facts of one thing."""
    if isinstance(value, Mapping):
        return len(value) <= 3 and not any(isinstance(inner, Mapping) for inner in value.values())
    return not any(isinstance(inner, Mapping) for inner in value)
