"""The job that lets a model do what it does once, such as training, before it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from membench.protocol import requests
from membench.protocol.case import Plugin
from membench.protocol.forking import StartWorker
from membench.running.deriving import JobReadings
from membench.running.figures import Figures
from membench.running.jobs.kind import RunnableJob
from membench.running.references import References


@dataclass(frozen=True, kw_only=True)
class PreparingJob(RunnableJob):
    """It leaves files of the model's own, and no record."""

    model: Plugin

    @property
    def names(self) -> Mapping[str, Any]:
        return {"model": self.model.use}

    def order(self, number: int, references: References) -> StartWorker:
        del references
        request = requests.encode(requests.Request(requests.PrepareModel(self.model), self.asked(number)))
        return StartWorker(request, number, self.settings.isolation)

    def derive(self, readings: JobReadings) -> Figures:
        del readings
        return Figures()
