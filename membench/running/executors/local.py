"""The executor that runs jobs on this machine, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from membench.host import environment
from membench.host.device import Device
from membench.records.record import Record
from membench.running.jobs.runnable import RunnableJob
from membench.running.needs import Needs
from membench.running.rank import Tell
from membench.running.runner import Runner
from membench.running.running_job import Turn


def machine_here(threads: int | None, devices: Sequence[Device]) -> dict[str, Any]:
    """Return the description of this machine for jobs on some devices."""
    return environment.describe(threads, with_gpus=any(device.on_gpu for device in devices))


class LocalExecutor:
    """Runs jobs on this machine. Use as a context manager."""

    def __init__(self, needs: Needs, tell: Tell, turn: Turn | None = None) -> None:
        """Prepare the executor; no process is started before the first job, except to verify models.

        Args:
            turn: coordinates the jobs with other runners on this machine.

        Raises:
            SuiteError: if the options of a model are wrong.
        """
        self.machine: Mapping[str, Any] = machine_here(needs.threads, needs.devices)
        self._runner = Runner(needs, self.machine, tell, turn)
        try:
            self._runner.refuse_wrong_models()
        except BaseException:
            self._runner.restart()
            raise

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.__exit__(kind, error, at)

    def measure(self, job: RunnableJob) -> Record:
        return self._runner.measure(job)

    def restart(self) -> None:
        self._runner.restart()
