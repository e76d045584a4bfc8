"""Programs of a user's own on several ranks: started as torchrun does, or by torchrun itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import membench
from membench.errors import SuiteError
from membench.host import procfs
from membench.records.record import Record
from membench.running.derived_metrics import resolution_bytes
from membench.running.launched_ranks import LaunchedRanks

_MIB = 2**20

_TRAIN = """\
import json, os
import torch
from torch import distributed
import membench

distributed.init_process_group()
rank = distributed.get_rank()
with membench.phase("hold"):
    held = bytearray(b"1") * ((64 + 64 * rank) * 2**20)
together = torch.ones(1) * (rank + 1)
distributed.all_reduce(together)
known = {name: value for name, value in os.environ.items() if name.isupper()}
with open(f"seen-{rank}.json", "w") as file:
    json.dump([together.item(), torch.get_num_threads(), known], file)
distributed.barrier()
distributed.destroy_process_group()
"""


def _run(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], Record]:
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "membench", "run", *words], cwd=folder, capture_output=True, text=True, env=variables
    )
    return done, membench.read_run(membench.newest_run(folder / "results")).records[-1]


def _seen(folder: Path) -> list[Any]:
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Record]]:
    """The same program started by membench on two ranks, and by the user's own torchrun."""
    found = {}
    for name, words in {
        "membench": ("--script", "train.py", "--ranks", "2"),
        "torchrun": ("-m", "torch.distributed.run", "--", "--nproc-per-node", "2", "train.py"),
    }.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "train.py").write_text(_TRAIN)
        found[name] = (folder, *_run(folder, *words))
    return found


def test_ranks_meet_and_see_the_variables_that_torchrun_sets(both: dict[str, tuple[Path, Any, Record]]) -> None:
    ours, theirs = (_seen(both[name][0]) for name in ("membench", "torchrun"))
    # The address and the agent that holds the store are torchrun's own; without one, rank 0 opens the store.
    own = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
           "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "MEMBENCH_PHASES"}  # fmt: skip
    for (total, threads, variables), (their_total, their_threads, their_variables) in zip(ours, theirs, strict=True):
        assert (total, threads) == (their_total, their_threads) == (3.0, 1)
        assert {name: value for name, value in variables.items() if name not in own} == {
            name: value for name, value in their_variables.items() if name not in own
        }
        assert variables["MASTER_ADDR"] == "127.0.0.1"
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        assert ours[0][2][name] == ours[1][2][name]


def test_each_rank_has_its_own_peak_and_phases_and_the_job_the_worst_and_the_total(
    both: dict[str, tuple[Path, Any, Record]],
) -> None:
    _, done, record = both["membench"]
    assert (done.returncode, record.status, record.id) == (0, "ok", "train/none/script/2xcpu")
    peaks = []
    for rank, process in enumerate(record.processes):
        assert (process.rank, process.role, process.device, process.exit_code) == (rank, "script", "cpu", 0)
        whole, hold = process.phases
        assert (whole.name, hold.name, hold.inside, hold.bound) == ("script", "hold", "script", None)
        assert hold.peak_footprint_bytes is not None
        peaks.append(hold.peak_footprint_bytes)
    assert peaks[1] - peaks[0] == pytest.approx(64 * _MIB, abs=4 * _MIB)
    assert record.metrics["peak_footprint_bytes"] == record.processes[1].phases[0].peak_footprint_bytes
    assert record.obtained["peak_footprint_bytes"]["rank"] == 1
    assert record.metrics["total_peak_footprint_bytes"] == sum(
        process.phases[0].peak_footprint_bytes or 0 for process in record.processes
    )
    assert "OMP_NUM_THREADS is 1 for each rank, as torchrun sets it" in done.stdout
    assert "total footprint" in done.stdout


def test_ranks_of_a_users_own_torchrun_are_told_apart_by_their_environment(
    both: dict[str, tuple[Path, Any, Record]],
) -> None:
    _, done, record = both["torchrun"]
    assert (done.returncode, record.status, record.id) == (0, "ok", "torch.distributed.run/none/script/cpu")
    launcher, *ranks = record.processes
    assert (launcher.role, launcher.rank) == ("script", 0)
    assert [(process.role, process.rank) for process in ranks] == [("rank", 0), ("rank", 1)]
    first, second = (process.phases[0] for process in ranks)
    ours = [process.phases[0].peak_footprint_bytes for process in both["membench"][2].processes]
    for phase, expected in zip((first, second), ours, strict=True):
        assert phase.peak_footprint_bytes == pytest.approx(expected, abs=8 * _MIB)
    # The kernel reports the highest peak of all that the launcher waited for: the largest rank's is exact.
    assert (first.bound, second.bound) == ("at least", None)
    assert record.obtained["peak_footprint_bytes"]["bound"] == "at least", "of the launcher and its ranks together"


def test_a_number_of_ranks_in_a_suite_is_its_device(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\nassert os.environ['WORLD_SIZE'] == '1'\n")
    suite = membench.Suite("own", script={"file": str(tmp_path / "own.py"), "ranks": 1})
    record = membench.run(suite, output=tmp_path / "results").records[0]
    assert (record.id, record.status) == ("own/none/script/1xcpu", "ok")
    assert "ranks" not in record.case["model_plugin"]["options"]
    assert not record.notes, "torchrun leaves the threads of a single process alone"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"ranks": 0}, "script.ranks = 0: "),
        ({"ranks": "2"}, "script.ranks = '2': "),
        ({"ranks": 2, "device": "2xcpu"}, "script.ranks = 2 on device '2xcpu': write cpu or cuda where a number of"),
        ({"ranks": 2, "device": "cuda:1"}, "script.ranks = 2 on device 'cuda:1': write cpu or cuda where a number of"),
    ],
)
def test_a_number_of_ranks_that_makes_no_sense_is_one_line(tmp_path: Path, script: Any, message: str) -> None:
    (tmp_path / "own.py").touch()
    with pytest.raises(SuiteError) as caught:
        membench.Suite("own", script={"file": str(tmp_path / "own.py"), **script})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--script", "own.py", "--ranks", "0"), "argument --ranks: write a number from 1 to 9999"),
        (
            ("--script", "own.py", "--ranks", "2", "--device", "4xcpu"),
            "membench: --ranks 2 on device '4xcpu': write cpu",
        ),
        (
            ("quickstart", "--ranks", "2"),
            "membench: --ranks is for --script and -m; of a suite's cases the device says",
        ),
    ],
)
def test_ranks_on_the_command_line_that_make_no_sense_exit_with_2(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "own.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "membench", "run", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_the_rank_that_fails_is_named_and_not_the_one_that_lost_it_and_ended_before(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, time, torch, membench\n"
        "from torch import distributed\n"
        "distributed.init_process_group()\n"
        "distributed.barrier()\n"
        "with membench.phase('step'):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        distributed.destroy_process_group()\n"
        "        time.sleep(0.2)\n"
        "        raise ValueError('boom')\n"
        "    distributed.all_reduce(torch.ones(1))\n"
    )
    suite = membench.Suite("own", script={"file": str(tmp_path / "own.py"), "ranks": 2})
    record = membench.run(suite, output=tmp_path / "results").records[0]
    assert (record.status, record.ended_in) == ("failed", "step")
    assert record.message == "rank 1: ended with exit code 1: ValueError: boom"
    assert not Path(f"/proc/{record.processes[0].pid}").exists()
    assert (record.metrics["peak_footprint_bytes"] or 0) > resolution_bytes(), "what was measured until then is kept"


def test_the_peak_of_a_rank_is_exact_only_if_the_kernel_reports_it_as_the_highest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = {11: 100 * _MIB, 12: 90 * _MIB, 13: 5 * _MIB}
    environment = {10: None, 11: 0, 12: 1, 13: 1, 14: None}
    monkeypatch.setattr(procfs, "rank_of", environment.get)
    monkeypatch.setattr(procfs, "resident", lambda pid: SimpleNamespace(peak_bytes=peaks[pid]))
    ranks = LaunchedRanks(10)
    ranks.look([11, 12, 13, 14], 1.0)
    ranks.look([11, 12], 3.0)

    def bounds(highest_bytes: int | None) -> list[str | None]:
        return [process.phases[0].bound for process in ranks.readings("cpu", "script", highest_bytes)]

    assert bounds(100 * _MIB) == [None, "at least"]
    for unknown in (None, 120 * _MIB, 80 * _MIB):  # it grew after the last sample, or nobody waited for it
        assert bounds(unknown) == ["at least", "at least"]
    first, second = ranks.readings("cpu", "script", None)
    assert (second.pid, second.phases[0].peak_footprint_bytes) == (12, 90 * _MIB), "the larger process of two"
    assert (first.phases[0].began_s, first.phases[0].ended_s) == (1.0, 3.0)
