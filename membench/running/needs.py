"""Requirements of a run on its executor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from membench.host.device import Device
from membench.protocol.case import Plugin
from membench.running.jobs.runnable import RunnableJob


@dataclass(frozen=True)
class Needs:
    """Requirements of a run on its executor.

    Attributes:
        devices: the devices that its jobs run on.
        threads: compute threads of a worker; ``None`` leaves the number to the measured program.
        references: the folder of the run for the logits of reference cases.
        preload: modules that the fork server imports once, which keeps the import time out of every job.
        variables: environment variables that are set for measured processes only.
        unverified: the models, by name, whose options torch must verify before the first job.
    """

    devices: tuple[Device, ...]
    threads: int | None
    references: Path
    preload: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    unverified: Mapping[str, Plugin] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        jobs: Iterable[RunnableJob],
        references: Path,
        variables: Mapping[str, str] | None = None,
        *,
        described: Sequence[RunnableJob] | None = None,
    ) -> Needs:
        """Return the combined requirements of jobs.

        Args:
            described: the jobs that the machine is described for, if a later run of others may continue this one.
        """
        known = list(jobs)
        described = described or known
        # A spawned interpreter imports its modules itself: preloading does not help it.
        modules = {module for job in known if job.settings.isolation == "fork" for module in job.modules}
        return cls(
            tuple(dict.fromkeys(job.device for job in described)),
            described[0].threads if described else None,
            references,
            tuple(sorted(modules)),
            variables or {},
            {name: model for job in known for name, model in job.unverified.items()},
        )

    @property
    def on_gpu(self) -> bool:
        """Whether any job runs on a CUDA device."""
        return any(device.on_gpu for device in self.devices)
