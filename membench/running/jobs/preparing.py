"""The job that prepares a model once before it is measured, such as by training it."""

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
class PreparingJob(RunnableJob):
    """Preparation of a model: it leaves the model's files and produces no record."""

    model: Plugin

    @property
    def names(self) -> Mapping[str, Any]:
        return {"model": self.model.use}

    def order(self, number: int, references: References) -> StartWorker:
        del references
        request = requests.encode(requests.Request(requests.PrepareModel(self.model), self.rank_request(number)))
        return StartWorker(request, number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> DerivedMetrics:
        del readings
        return DerivedMetrics()
