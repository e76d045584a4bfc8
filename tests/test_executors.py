"""The interface between session and executor: a record of each job, with the machine it was measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import membench
from membench.records.record import Record
from membench.running.executors.local import LocalExecutor
from membench.running.jobs.runnable import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.session import run

_SUITE = """\
[suite]
name = "remote"
[matrix]
model = ["block"]
technique = ["none", "bf16"]
workload = ["known-burst"]
[settings]
threads = 1
measured_steps = 1
"""


class _RemoteExecutor:
    """Measures on this machine, and labels each record with another machine."""

    def __init__(self, needs: Needs, tell: Tell) -> None:
        self.machine: Mapping[str, Any] = {"system": "remote", "cores": 64}
        self.needs, self._local = needs, LocalExecutor(needs, tell)
        self.jobs: list[str] = []
        self.is_closed = False
        _OPENED.append(self)

    def measure(self, job: RunnableJob) -> Record:
        self.jobs.append(job.id)
        node = {"system": f"node {len(self.jobs)}", "cores": 64}
        return dataclasses.replace(self._local.measure(job), machine=node)

    def restart(self) -> None:
        self._local.restart()

    def __enter__(self) -> _RemoteExecutor:
        self._local.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.is_closed = True
        self._local.__exit__(kind, error, at)


_OPENED: list[_RemoteExecutor] = []


def test_the_header_and_each_record_name_the_machine_of_the_executor(tmp_path: Path) -> None:
    path = tmp_path / "remote.toml"
    path.write_text(_SUITE)
    _OPENED.clear()
    measured = run(membench.load_suite(path), output=tmp_path / "results", executor=_RemoteExecutor)
    (executor,) = _OPENED
    assert measured.header["machine"] == {"system": "remote", "cores": 64}
    assert [record.machine["system"] for record in measured.records] == ["node 1", "node 2"]
    assert [record.status for record in measured.records] == ["ok", "ok"]
    assert executor.jobs == ["block/none/known-burst/cpu", "block/bf16/known-burst/cpu"]
    assert executor.is_closed
    assert str(executor.needs.devices[0]) == "cpu"
    assert executor.needs.threads == 1
    assert "membench.worker.main" in executor.needs.preload
