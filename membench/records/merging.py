"""Putting runs of one suite together, as its shares are measured apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from membench.errors import ResultsError
from membench.host import environment
from membench.records.encoding import as_json
from membench.records.record import Record
from membench.records.run_file import Run, RunFile, read_run

_OF_ONE_SUITE = ("suite", "suite_sha256", "suite_text", "devices", "plugin_files", "own_metrics")
"""Keys of the header that all runs must share."""


def merge(paths: Sequence[Path], output: Path) -> Run:
    """Write a run with the records of others; one that is in several of them is kept once.

    Args:
        output: the file to write, which must not exist.

    Raises:
        ResultsError: if a run is of another suite, code or kind of machine than the first, if two have different
            records of the same case, or if the file cannot be written. Nothing is written then.
    """
    runs = [read_run(path) for path in paths]
    for run in runs[1:]:
        _refuse_other(runs[0], run)
    records = _together(runs)
    headers = [run.header for run in runs]
    started_at = min(str(header.get("started_at", "")) for header in headers)
    shards = {header.get("shard") for header in headers}
    header = {key: value for key, value in headers[0].items() if key not in ("schema", "shard")}
    header |= {"started_at": started_at, "merged": sorted({str(header["run"]) for header in headers})}
    if len(shards) == 1 and None not in shards:
        header["shard"] = shards.pop()
    with RunFile.create(output, header) as file:
        try:
            for record in records:
                file.append(record)
        except ResultsError:
            output.unlink(missing_ok=True)
            raise
    return read_run(output)


def missing_shards(runs: Sequence[Run]) -> list[str]:
    """Return the shares that runs of a suite lack, as far as the runs are of shares: ``3/16``."""
    shards = [str(shard) for run in runs if (shard := run.header.get("shard"))]
    of = {shard.partition("/")[2] for shard in shards}
    return [
        written for count in sorted(of) for number in range(1, int(count) + 1)
        if (written := f"{number}/{count}") not in shards
    ]  # fmt: skip


def _refuse_other(first: Run, other: Run) -> None:
    """Refuse a run that does not belong to the first.

    Raises:
        ResultsError: if it does not.
    """
    for key in _OF_ONE_SUITE:
        if first.header.get(key) != other.header.get(key):
            raise ResultsError(f"{other.path}: differs from {first.path} in '{key}': they are not runs of one suite")
    commits = [_commit(run.header) for run in (first, other)]
    if None not in commits and commits[0] != commits[1]:
        raise ResultsError(f"{other.path}: is of commit {commits[1]}, and {first.path} of {commits[0]}")
    unlike = environment.differences(first.header.get("machine", {}), other.header.get("machine", {}))
    if unlike:
        raise ResultsError(
            f"{other.path}: was measured on another kind of machine than {first.path} ({unlike[0]}); figures of two do"
            " not go together"
        )


def _commit(header: Mapping[str, Any]) -> str | None:
    commit = (header.get("code") or {}).get("commit")
    return None if commit is None else str(commit)[:12]


def _together(runs: Sequence[Run]) -> list[Record]:
    """Return the records of all runs, each once.

    Raises:
        ResultsError: if two runs have different records of the same case and repeat.
    """
    found: dict[tuple[str, int], tuple[Run, Record]] = {}
    for run in runs:
        for record in run.records:
            known = found.setdefault((record.id, record.repeat), (run, record))
            if as_json(known[1]) != as_json(record):
                raise ResultsError(
                    f"{run.path}: {record.id} was measured there and in {known[0].path}; leave one of the runs out"
                )
    return [record for _, record in found.values()]
