"""A case and the plug-ins that it is made of, with names as the suite wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REFERENCE = "none"
"""The technique whose case every ratio is against."""


@dataclass(frozen=True)
class PluginFile:
    """A file of a suite's own plug-ins: its name in the suite, where it is, and what it was when the suite was read."""

    name: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Plugin:
    """A plug-in named by a suite: what to look up, with which options, and in which file if it is not installed."""

    use: str
    options: Mapping[str, Any] = field(default_factory=dict)
    file: PluginFile | None = None

    @property
    def files(self) -> tuple[PluginFile, ...]:
        return () if self.file is None else (self.file,)


@dataclass(frozen=True)
class Case:
    """One thing to measure, with names as the suite wrote them and what they stand for."""

    model: str
    technique: str
    workload: str
    device: str
    model_plugin: Plugin
    technique_plugins: tuple[Plugin, ...]
    workload_plugin: Plugin
    metric_plugins: Mapping[str, Plugin] = field(default_factory=dict)
    """By field, the quality metrics that are plug-ins."""
    command: tuple[str, ...] | None = None
    """Of a user's program: how it is started, its arguments included."""

    @property
    def plugins(self) -> tuple[tuple[str, Plugin], ...]:
        """All that it is made of, each with its kind."""
        return (
            ("model", self.model_plugin),
            *(("technique", plugin) for plugin in self.technique_plugins),
            ("workload", self.workload_plugin),
            *(("metric", plugin) for plugin in self.metric_plugins.values()),
        )

    @property
    def id(self) -> str:
        return f"{self.model}/{self.technique}/{self.workload}/{self.device}"

    @property
    def group(self) -> tuple[str, str, str]:
        return (self.model, self.workload, self.device)
