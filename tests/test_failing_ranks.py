"""One of two ranks fails: the record names it, its phase and its own message, and nothing of the case is left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import membench
from membench.host.device import Device
from membench.records.record import Record
from membench.running.rank import Rank
from membench.running.session import silent
from membench.running.where_it_hung import frames, waits_for_others

_PLUGIN = Path(__file__).parent / "failing_ranks.py"
_WAYS = {
    "exits": ("crashed", "rank 1: ended with exit code 7 before it was done"),
    "is killed": ("crashed", "rank 1: killed by SIGKILL"),
    "takes no more": ("out-of-memory", "rank 1: MemoryError: no room on this rank"),
    "asks too much": ("out-of-memory", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824"),
    "raises": ("failed", "rank 1: ValueError: only on this rank"),
    "raises after the others": ("failed", "rank 1: ValueError: only on this rank"),
}

_HANGS_AFTER_S = 8
"""Long enough for two ranks on a busy machine to get as far as where one of them hangs."""


def _run(folder: Path, ways: dict[str, dict[str, str]], *more: str, timeout_s: float = 60) -> dict[str, Record]:
    named = {way.replace(" ", "-"): {"use": "fails", **options} for way, options in ways.items()}
    suite = membench.Suite(
        "failing",
        plugins=[str(_PLUGIN)],
        matrix={"model": ["untrained-tiny"], "technique": [*named, *more], "workload": ["train"], "device": ["2xcpu"]},
        technique=named,
        settings={"measured_steps": 2, "evaluate_s": 0, "timeout_s": timeout_s},
    )
    return {record.technique.replace("-", " "): record for record in membench.run(suite, output=folder).records}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Each way to fail, one after the other in one run, and then a case that does not fail."""
    ways = {way: {"how": way} for way in _WAYS} | {"rehearses": {"how": "raises", "where": "apply"}}
    return _run(tmp_path_factory.mktemp("failing"), ways, "ddp")


@pytest.mark.parametrize("way", _WAYS)
def test_the_record_names_the_rank_that_failed_its_phase_and_its_own_message(
    records: dict[str, Record], way: str
) -> None:
    record = records[way]
    status, message = _WAYS[way]
    assert (record.status, record.ended_in) == (status, "run")
    assert message in (record.message or "")
    assert (record.message or "").startswith("rank 1: ")
    assert "Connection closed" not in (record.message or "")
    for process in record.processes:
        assert [phase.name for phase in process.phases] == ["load", "apply", "warmup"], "what was measured is kept"


def test_nothing_of_a_failed_case_is_left_and_the_next_one_is_clean(records: dict[str, Record]) -> None:
    assert (records["ddp"].status, records["ddp"].message) == ("ok", None)
    pids = {process.pid for record in records.values() for process in record.processes}
    assert len(pids) == 2 * (len(records) - 1) + 1, "and their reference, on one process"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not [file for file in os.listdir("/dev/shm") if any(f"_{pid}_" in file for pid in pids)]
    assert not list(Path(tempfile.gettempdir()).glob(f"membench-{os.getpid()}-*"))


def test_a_rank_that_hangs_is_named_with_the_line_it_is_in_and_not_one_that_waits_for_it(tmp_path: Path) -> None:
    record = _run(tmp_path, {"hangs": {"how": "hangs"}}, timeout_s=_HANGS_AFTER_S)["hangs"]
    assert (record.status, record.ended_in) == ("timeout", "run")
    line = 1 + _PLUGIN.read_text().splitlines().index("                time.sleep(600)")
    where = f"it was in _fail (failing_ranks.py, line {line})"
    assert record.message == f"rank 1: not done after {_HANGS_AFTER_S} s; {where}"
    assert not [process.pid for process in record.processes if Path(f"/proc/{process.pid}").exists()]


def test_a_rank_that_fails_where_others_rehearse_on_is_no_case_that_hangs(records: dict[str, Record]) -> None:
    record = records["rehearses"]
    assert (record.status, record.message) == ("failed", "rank 1: ValueError: only on this rank")


_HANGING = """\
[suite]
name = "hanging"
plugins = ["failing_ranks.py"]
[matrix]
model = ["untrained-tiny"]
technique = ["hangs"]
workload = ["train"]
device = ["2xcpu"]
[technique.hangs]
use = "fails"
how = "hangs"
"""


def test_ranks_end_with_a_runner_that_is_killed_and_leave_no_file(tmp_path: Path) -> None:
    (tmp_path / "hanging.toml").write_text(_HANGING)
    (tmp_path / _PLUGIN.name).write_text(_PLUGIN.read_text())
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "membench", "run", "hanging.toml", "-k", "2xcpu"],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.DEVNULL,
    ) as runner:  # fmt: skip
        # The fork server and its two ranks, which have met.
        try:
            family = _until(lambda: psutil.Process(runner.pid).children(recursive=True), 3)
            _until(lambda: list(temporary.glob("membench-*/ranks")), 1)
        finally:
            runner.kill()
    _until(lambda: [0] * all(not each.is_running() or each.status() == "zombie" for each in family), 1)
    _until(lambda: [0] * (not list(temporary.glob("membench-*"))), 1)


def _until(look: Any, least: int) -> Any:
    """Wait until so many are found."""
    deadline = time.monotonic() + 60
    while len(found := look()) < least:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


_STACK = """\
Stack (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 3111 in all_reduce
  File "/site/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/own.py", line 7 in step
"""


def _rank(said: str) -> Rank:
    rank = Rank(0, Device.parse("cpu"), silent)
    rank.add_output(said.encode())
    return rank


def test_a_rank_in_a_collective_waits_for_others_and_one_in_code_of_its_own_does_not() -> None:
    assert str(frames(_STACK)[0]) == "in all_reduce (distributed_c10d.py, line 3111)"
    assert waits_for_others(_rank(f"printed\n{_STACK}"))
    assert not waits_for_others(_rank(_STACK.replace("/site/torch/distributed/", "/home/")))
    assert not waits_for_others(_rank("it said nothing of the kind")), "of which nothing is known"
    assert not frames("it said nothing of the kind")


@pytest.mark.parametrize(
    ("message", "is_of_another"),
    [
        ("RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:36017", True),
        ("RuntimeError: Connection reset by peer", True),
        ("ValueError: only on this rank", False),
    ],
)
def test_a_rank_that_lost_its_peer_is_no_culprit(message: str, is_of_another: bool) -> None:
    rank = Rank(0, Device.parse("cpu"), silent)
    rank.status, rank.message = "failed", message
    assert rank.blames_another is is_of_another
