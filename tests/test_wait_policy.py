"""How threads of parallel operations wait for each other: as in a user's process, or passively under load."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from membench.host import environment
from membench.host.device import Device
from membench.protocol import pickling
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.function import PRELOADED, FunctionJob
from membench.running.needs import Needs
from membench.running.session import silent
from membench.suite.schema import Settings
from membench.worker.waiting import Waiting

_MIB = 2**20

_SWITCHED = """
import ctypes, json, os, time
import torch
from membench.host import procfs
from membench.worker.waiting import LIBRARY, Waiting

torch.set_num_threads(2)
(library,) = procfs.loaded_libraries(LIBRARY)
nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)

def spun_ms():
    'Processor time that threads use in an empty parallel operation and after it.'
    def once():
        # From before it: where both threads share a core, the other one spins before this one goes on.
        began = time.process_time()
        ctypes.CDLL(library).GOMP_parallel(nothing, None, 2, 0)
        time.sleep(0.01)
        return (time.process_time() - began) * 1e3
    return max(once() for _ in range(10))

waiting = Waiting(2)
threads = len(os.listdir('/proc/self/task'))
spun = [spun_ms()]
for _ in range(2):
    waiting.be_passive()
    spun.append(spun_ms())
    waiting.be_as_users()
    spun.append(spun_ms())
print(json.dumps({'spun_ms': spun, 'policies': [waiting.policy(0, 5), waiting.policy(2, 5), waiting.policy(5, 5)],
                  'left': len(os.listdir('/proc/self/task')) - threads}))
"""


def _measured_spinning(code: str, **variables: str) -> Mapping[str, Any]:
    own = {name: value for name, value in os.environ.items() if name not in environment.WAIT_POLICY_VARIABLES}
    ran = subprocess.run([sys.executable, "-c", code], env=own | variables, check=True, stdout=subprocess.PIPE)
    found: Mapping[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads wait for each other on two cores or more")
def test_the_switch_makes_threads_wait_passively_and_as_in_a_users_process_again() -> None:
    found = _measured_spinning(_SWITCHED)
    as_users, passive, again, passive_again, at_last = found["spun_ms"]
    # A thread that spins does so for some 7 ms; one that waits passively for a hundredth of that.
    assert min(as_users, again, at_last) > 5 * max(passive, passive_again)
    assert found["left"] == 1  # the second thread of the team that was asked for here
    assert found["policies"] == [
        "threads wait as in a user's process",
        "threads wait passively in 2 of 5 steps: other processes used the cores",
        "threads wait passively: other processes used the cores",
    ]


def test_a_policy_of_the_users_own_is_kept_and_nothing_is_switched() -> None:
    found = _measured_spinning(_SWITCHED, OMP_WAIT_POLICY="PASSIVE")
    assert max(found["spun_ms"]) < 1
    assert found["policies"] == ["threads wait as OMP_WAIT_POLICY=PASSIVE says"] * 3


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads wait for each other on two cores or more")
def test_a_process_in_which_a_technique_prepares_its_files_waits_passively() -> None:
    prepared = (
        _SWITCHED.partition("waiting = Waiting(2)")[0]
        + """
from membench.worker.child_process import run_in_child

def settled_ms():
    time.sleep(0.1)  # the idle team's own thread spins once, when it is made
    return {'ms': [spun_ms()]}

print(json.dumps({'spun_ms': run_in_child(settled_ms)['ms']}))
"""
    )
    assert _measured_spinning(prepared)["spun_ms"][0] < 3


def test_one_thread_waits_for_none() -> None:
    waiting = Waiting(1)
    waiting.be_passive()
    assert not waiting.is_passive
    assert waiting.policy(0, 5) == "one thread"


def _measured(folder: Path, source: str, threads: int) -> FunctionJob:
    names: dict[str, object] = {}
    exec(source, names)
    call = pickling.as_bytes((names["function"], (), {}), by_value=())
    (folder / "call").write_bytes(pickle.dumps(pickling.FunctionCall(sys.path, str(folder), dict(os.environ), call)))
    return FunctionJob(
        id="f", repeat=0, device=Device.parse("cpu"), model="file", workload="test", pickled=folder / "call",
        raised=folder / "raised",
        settings=Settings.model_validate({"measured_steps": 1, "threads": threads, "calm_within_s": 0}),
    )  # fmt: skip


_PRODUCT = """
import numpy, threadpoolctl

def function():
    first = numpy.ones((256, 512)) @ numpy.ones((512, 1024))
    found = [each["num_threads"] for each in threadpoolctl.threadpool_info() if each["internal_api"] == "openblas"]
    with open("threads", "a") as file:
        print(*found, file=file)
    return first
"""


@pytest.mark.parametrize(("own", "threads"), [(None, "3"), ("1", "1")])
def test_numpys_products_have_the_threads_of_a_users_process_and_their_buffers_are_not_its_memory(
    own: str | None, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", own)
    job = _measured(tmp_path, _PRODUCT, 3)
    with LocalExecutor(Needs((job.device,), job.threads, tmp_path, PRELOADED), silent) as executor:
        record = executor.measure(job)
    assert (record.status, record.message) == ("ok", None)
    assert set((tmp_path / "threads").read_text().split()) == {threads}
    # The result is kept: 256 × 1024 numbers of 8 bytes. Both operands are there with it at the peak: 1 and 4 MiB.
    assert record.metrics["held_live_bytes"] == pytest.approx(2 * _MIB, abs=0.5 * _MIB)
    assert record.metrics["peak_live_bytes"] == pytest.approx(7 * _MIB, abs=_MIB)
