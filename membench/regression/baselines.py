"""Baselines on disk: finding, reading, writing and removing their files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from membench.errors import ResultsError, did_you_mean
from membench.records import strict_json
from membench.records.validation import shown
from membench.regression.baseline_text import decoded, encoded
from membench.regression.machines import Difference, differences, machine_class
from membench.regression.measured import Measured, MeasuredCase
from membench.regression.noise import Noise
from membench.units import format_bytes

FOLDER = Path("results") / "baselines"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79}(@[A-Za-z0-9_][A-Za-z0-9_.+-]{0,79})?")
_LARGEST_FILE_BYTES = 2**26


def default_name(measured: Measured) -> str:
    """``SUITE@MACHINE-CLASS``."""
    return f"{measured.suite}@{machine_class(measured.machine, measured.on_gpu)}"


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """Return the path of a baseline: ``FOLDER/NAME.json``.

    Raises:
        ResultsError: if the name is not valid: letters, digits, '.', '_', '+', '-' and one '@'.
    """
    if not is_name(name):
        raise ResultsError(
            f"{shown(name)} is no name for a baseline: it has letters, digits, '.', '_', '+', '-' and one '@',"
            " such as 'quickstart@2-cores-epyc'"
        )
    return folder / f"{name}.json"


def is_name(name: str) -> bool:
    """Whether a baseline may have this name."""
    return _NAME.fullmatch(name) is not None


def write(measured: Measured, path: Path) -> None:
    """Write a measurement as a baseline, atomically.

    Raises:
        ResultsError: if it cannot be written, or none of its cases was measured.
    """
    if not any(case.is_measured for case in measured.cases.values()):
        raise ResultsError(f"{measured.name}: no case of it ended well; that is no baseline")
    text = encoded(dataclasses.replace(measured, name=path.stem))
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
    """Write a measurement in place of the baseline that may exist, whose noise of the same machine is kept.

    Raises:
        ResultsError: as ``write``; if the file that exists is not a baseline.
    """
    if path.is_file():
        measured = dataclasses.replace(measured, noise=_noise(read(path), measured))
    write(measured, path)


class Kept(NamedTuple):
    """A baseline after cases were written into it, and how many of its cases are unchanged."""

    baseline: Measured
    stay: int


def write_into(measured: Measured, path: Path) -> Kept:
    """Write a measurement into the baseline that may exist. Cases that failed now, or were not measured, are kept.

    Raises:
        ResultsError: as ``write``; if the file that exists is not a baseline, or its kept cases are of another machine.
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
    """Return what is known of the noise of the new measurement's machine."""
    return new.noise if _unlike(kept, new) else kept.noise | new.noise


def _unlike(kept: Measured, new: Measured) -> list[Difference]:
    on_gpu = any(case.on_gpu for case in (*kept.cases.values(), *new.cases.values()))
    return [each for each in differences(kept.machine, new.machine) if each.bars(on_gpu)]


def read(path: Path) -> Measured:
    """Read a baseline.

    Raises:
        ResultsError: in one line, if it is not a baseline, is damaged or of a newer schema.
    """
    try:
        with strict_json.open_file(path) as file:
            text = file.read(_LARGEST_FILE_BYTES + 1)
        if len(text) > _LARGEST_FILE_BYTES:
            raise ResultsError(f"larger than any baseline: more than {format_bytes(_LARGEST_FILE_BYTES)}")
        measured = decoded(text)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from None
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    return dataclasses.replace(measured, name=path.stem)  # renaming the file renames the baseline


def names(folder: Path = FOLDER) -> list[str]:
    """List the baselines in a folder."""
    try:
        return sorted(path.stem for path in folder.glob("*.json") if is_name(path.stem) and path.is_file())
    except OSError as error:
        raise ResultsError(f"{folder}: cannot be read: {error.strerror}") from None


def named(name: str, folder: Path = FOLDER) -> Measured:
    """Read a baseline by its name.

    Raises:
        ResultsError: as ``read``; if there is none of this name, with the nearest name.
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
