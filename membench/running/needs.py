"""What a run needs of whatever runs its jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from membench.host.device import Device
from membench.running.jobs.kind import RunnableJob


@dataclass(frozen=True)
class Needs:
    """What a run needs of an executor.

    Attributes:
        devices: on which its jobs run.
        threads: that a worker computes with; ``None`` leaves that to what is measured.
        references: the folder that goes with the run, for the logits of reference cases.
        preload: modules that are imported once, so that no job pays for them.
        variables: of the environment, for measured processes alone.
    """

    devices: tuple[Device, ...]
    threads: int | None
    references: Path
    preload: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, jobs: Iterable[RunnableJob], references: Path, variables: Mapping[str, str] | None = None
    ) -> Needs:  # fmt: skip
        """What these jobs need together."""
        known = list(jobs)
        # An interpreter of its own imports for itself.
        modules = {module for job in known if job.settings.isolation == "fork" for module in job.modules}
        return cls(
            tuple(dict.fromkeys(job.device for job in known)),
            known[0].threads if known else None,
            references,
            tuple(sorted(modules)),
            variables or {},
        )

    @property
    def on_gpu(self) -> bool:
        return any(device.on_gpu for device in self.devices)
