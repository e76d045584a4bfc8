"""What a session asks of an executor, whoever it is: a record for each job, and the machine that it was measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import membench
from membench.records.record import Record
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.kind import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.session import run

_SUITE = """\
[suite]
name = "elsewhere"
[matrix]
model = ["block"]
technique = ["none", "bf16"]
workload = ["known-burst"]
[settings]
threads = 1
measured_steps = 1
"""


class _Elsewhere:
    """Measures here, and says of each record that it is of another machine."""

    def __init__(self, needs: Needs, tell: Tell) -> None:
        self.machine: Mapping[str, Any] = {"system": "elsewhere", "cores": 64}
        self.needs, self._here = needs, LocalExecutor(needs, tell)
        self.jobs: list[str] = []
        self.is_closed = False
        OPENED.append(self)

    def measure(self, job: RunnableJob) -> Record:
        self.jobs.append(job.id)
        node = {"system": f"node {len(self.jobs)}", "cores": 64}
        return dataclasses.replace(self._here.measure(job), machine=node)

    def restart(self) -> None:
        self._here.restart()

    def __enter__(self) -> _Elsewhere:
        self._here.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.is_closed = True
        self._here.__exit__(kind, error, at)


OPENED: list[_Elsewhere] = []


def test_a_run_is_of_the_machine_that_its_executor_names_and_each_record_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.toml"
    path.write_text(_SUITE)
    OPENED.clear()
    kept = run(membench.load_suite(path), output=tmp_path / "results", executor=_Elsewhere)
    (executor,) = OPENED
    assert kept.header["machine"] == {"system": "elsewhere", "cores": 64}
    assert [record.machine["system"] for record in kept.records] == ["node 1", "node 2"]
    assert [record.status for record in kept.records] == ["ok", "ok"]
    assert executor.jobs == ["block/none/known-burst/cpu", "block/bf16/known-burst/cpu"]
    assert executor.is_closed
    assert str(executor.needs.devices[0]) == "cpu"
    assert executor.needs.threads == 1
    assert "membench.worker.main" in executor.needs.preload
