"""Cases and the plug-ins they consist of, under the names used in the suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from membench.host.device import Device

REFERENCE = "none"
"""The technique of reference cases, to which all ratios refer."""

Group = tuple[str, str, str]
"""Model, workload and device: cases that share them stand in one table."""


def reference_group(group: Group) -> Group:
    """Return the group of the reference of a group's cases: on a single device, where they run on several in ranks."""
    model, workload, device = group
    return (model, workload, str(Device.parse(device).single))


@dataclass(frozen=True)
class PluginFile:
    """A file of local plug-ins: its name in the suite, its path, and its fingerprint when the suite was read."""

    name: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Plugin:
    """A plug-in named by a suite: its registered name, its options, and its file if it is not installed."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: PluginFile | None = None

    @property
    def files(self) -> tuple[PluginFile, ...]:
        """Its file, if it is a local plug-in, else nothing."""
        return () if self.file is None else (self.file,)


@dataclass(frozen=True)
class Case:
    """A case of a suite: the names used in the suite, and the plug-ins they refer to."""

    model: str
    technique: str
    workload: str
    device: str
    model_plugin: Plugin
    technique_plugins: tuple[Plugin, ...]
    workload_plugin: Plugin
    metric_plugins: Mapping[str, Plugin] = field(default_factory=dict)
    """Quality metrics that are plug-ins, by metric field."""
    command: tuple[str, ...] | None = None
    """The command of a user's program with its arguments; ``None`` for other cases."""
    unspread: str | None = None
    """Of a case in ranks, the technique of the same training on a single device: the stack without what spreads it."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """The cases of the same model and workload that a stack is compared with: the device of each, by technique."""

    @property
    def plugins(self) -> tuple[tuple[str, Plugin], ...]:
        """All plug-ins of the case, each with its kind."""
        return (
            ("model", self.model_plugin),
            *(("technique", plugin) for plugin in self.technique_plugins),
            ("workload", self.workload_plugin),
            *(("metric", plugin) for plugin in self.metric_plugins.values()),
        )

    @property
    def id(self) -> str:
        """The id of the case: ``model/technique/workload/device``."""
        return f"{self.model}/{self.technique}/{self.workload}/{self.device}"

    @property
    def group(self) -> Group:
        """Model, workload and device."""
        return (self.model, self.workload, self.device)

    @property
    def reference_group(self) -> Group:
        """The group of the case's reference."""
        return reference_group(self.group)

    @property
    def in_ranks(self) -> bool:
        """Whether it runs on ranks, one on each of several devices."""
        return Device.parse(self.device).in_ranks

    @property
    def compared_with(self) -> frozenset[tuple[Group, str]]:
        """Groups and techniques of the cases that it is compared with: its reference, and parts of its stack."""
        parts = {((self.model, self.workload, device), part) for part, device in self.parts.items()}
        return frozenset({(self.reference_group, REFERENCE), *parts})
