"""The job that verifies the options of models before anything is measured, where only torch can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.protocol import requests
from membench.protocol.case import Plugin
from membench.protocol.forking import StartWorker
from membench.running.derived_metrics import DerivedMetrics
from membench.running.deriving import JobReadings
from membench.running.jobs.runnable import RunnableJob
from membench.running.references import References


@dataclass(frozen=True, kw_only=True)
class VerifyingJob(RunnableJob):
    """Verification of models, by name; it produces no record."""

    models: Mapping[str, Plugin]

    @property
    def names(self) -> Mapping[str, Any]:
        return {"models": list(self.models)}

    def order(self, number: int, references: References) -> StartWorker:
        del references
        request = requests.encode(requests.Request(requests.VerifyModels(self.models), self.rank_request(number)))
        return StartWorker(request, number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        del readings
        return DerivedMetrics()
