"""Shares of a suite, measured apart and put together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import membench
from membench.cli import main
from membench.errors import EXIT_BAD_INPUT, EXIT_OK, ResultsError, SuiteError
from membench.records.merging import merge
from membench.records.run_file import read_run
from membench.suite.sharding import Shard, share
from membench.suite.suite import Suite

_SUITE = """
[suite]
name = "shared"
[matrix]
model = ["trained-tiny", "untrained-tiny"]
technique = ["none", "bf16"]
workload = ["brief", "long"]
[workload.brief]
use = "forward"
sequence_length = 16
[workload.long]
use = "forward"
sequence_length = 32
[settings]
measured_steps = 1
evaluate_s = 0
calm_within_s = 0
"""


def _suite(folder: Path) -> Path:
    path = folder / "suite.toml"
    path.write_text(_SUITE)
    return path


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shares")
    suite = membench.load_suite(_suite(folder))
    return [membench.run(suite, output=folder / f"{number}", shard=Shard(number, 2)).path for number in (1, 2)]


def test_shares_are_all_cases_each_once_and_whole_groups() -> None:
    suite = membench.load_suite("everything")
    for of in (1, 3, 16):
        parts = [share(suite.cases, Shard(number, of)) for number in range(1, of + 1)]
        assert sorted(case.id for part in parts for case in part) == sorted(case.id for case in suite.cases)
        for part in parts:
            assert {case.reference_group for case in part}.isdisjoint(
                case.reference_group for other in parts if other is not part for case in other
            )


def test_shares_are_balanced_by_what_cases_take() -> None:
    suite = Suite(
        name="unequal",
        matrix={"model": ["llama-60m"], "technique": ["none"], "workload": ["heavy", "light-1", "light-2", "light-3"]},
        workload={
            "heavy": {"use": "train", "batch_size": 64, "sequence_length": 1024},
            **{f"light-{n}": {"use": "forward", "batch_size": 1, "sequence_length": n} for n in (1, 2, 3)},
        },
    )
    heavy, light = (share(suite.cases, Shard(number, 2)) for number in (1, 2))
    assert [case.workload for case in heavy] == ["heavy"]
    assert len(light) == 3


def test_runs_of_all_shares_together_are_a_run_of_the_suite(shares: list[Path], tmp_path: Path) -> None:
    merged = merge([*shares, shares[0]], tmp_path / "whole.jsonl")
    suite = membench.load_suite(_suite(tmp_path))
    assert sorted(record.id for record in merged.records) == sorted(case.id for case in suite.cases)
    assert "shard" not in merged.header
    assert merged.header["merged"] == sorted(read_run(path).header["run"] for path in shares)
    for path in shares:
        assert all(record in merged.records for record in read_run(path).records)


def test_the_command_prints_their_table_and_names_shares_that_are_missing(
    shares: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "part.jsonl"
    assert main(["merge", str(shares[1]), "-o", str(output)]) == EXIT_OK
    out = capsys.readouterr().out
    assert "shares that are not among these runs: 1/2" in out
    assert f"kept in {output}" in out
    assert main(["merge", str(shares[0]), "-o", str(output)]) == EXIT_BAD_INPUT
    assert "part.jsonl: cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suite_sha256": "0" * 64}, "in 'suite_sha256': they are not runs of one suite"),
        ({"machine": {"cores": 99}}, "was measured on another kind of machine than"),
        ({"code": {"commit": "f" * 40}}, "is of commit ffffffffffff, and"),
    ],
)
def test_a_run_that_does_not_belong_is_refused(
    shares: list[Path], tmp_path: Path, change: dict[str, object], said: str
) -> None:
    first, other = tmp_path / "first.jsonl", tmp_path / "other.jsonl"
    for path, of, changes in ((first, shares[0], {"code": {"commit": "a" * 40}}), (other, shares[1], change)):
        header, *lines = of.read_text().splitlines()
        entry = json.loads(header)
        for key, value in changes.items():
            entry[key] = {**entry[key], **value} if isinstance(value, dict) and entry.get(key) else value
        path.write_text("\n".join([json.dumps(entry), *lines]) + "\n")
    with pytest.raises(ResultsError, match=said):
        merge([first, other], tmp_path / "whole.jsonl")
    assert not (tmp_path / "whole.jsonl").exists()


def test_two_measurements_of_a_case_are_refused(shares: list[Path], tmp_path: Path) -> None:
    run = read_run(shares[0])
    header, line, *lines = shares[0].read_text().splitlines()
    entry = json.loads(line)
    entry["duration_s"] = 99.0
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([header, json.dumps(entry), *lines]) + "\n")
    with pytest.raises(ResultsError, match=f"{run.records[0].id} was measured there and in"):
        merge([shares[0], other], tmp_path / "whole.jsonl")


def test_a_share_is_continued_by_the_same_share_alone(shares: list[Path], tmp_path: Path) -> None:
    folder = shares[0].parent
    suite = membench.load_suite(_suite(tmp_path))
    assert membench.resumable(suite, folder, shard=Shard(1, 2)) == shares[0]
    assert membench.resumable(suite, folder, shard=Shard(2, 2)) is None
    assert membench.resumable(suite, folder) is None


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", "1 / 2"])
def test_what_names_no_share_is_refused(text: str) -> None:
    with pytest.raises(SuiteError, match="write which share of how many"):
        Shard.parse(text)


def test_a_dry_run_lists_the_cases_of_a_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_suite(tmp_path))
    listed = []
    for number in (1, 2):
        assert main(["run", path, "--shard", f"{number}/2", "--dry-run"]) == EXIT_OK
        listed.append(capsys.readouterr().out.split())
    assert [len(ids) for ids in listed] == [4, 4]
    assert main(["run", path, "--dry-run"]) == EXIT_OK
    assert sorted(listed[0] + listed[1]) == sorted(capsys.readouterr().out.split())
