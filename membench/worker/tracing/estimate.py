"""Estimating a case: on fake tensors where its stages run on them, else by arithmetic."""

from __future__ import annotations

import logging
from pathlib import Path

from membench.host.device import Device
from membench.plugins import Unsuitable
from membench.protocol.messages import Result, ResultSoFar
from membench.protocol.requests import EstimateCase
from membench.worker.meter import Meter
from membench.worker.tracing.arithmetic import by_arithmetic
from membench.worker.tracing.extrapolation import extrapolated
from membench.worker.tracing.traced_case import traced, untraceable


def estimate(work: EstimateCase, scratch: Path, meter: Meter) -> None:
    """Estimate a case and send what was found.

    Raises:
        plugins.Unsuitable: if a technique cannot be applied to the case, or if the case cannot be estimated.
    """
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it logs what is handled here
    device = Device.parse(work.device)
    try:
        found = list(
            extrapolated(work.case, device, scratch)
            if work.extrapolates
            else traced(work.case, device, work.threads, scratch)
        )
    except Unsuitable:
        raise
    except Exception as error:
        if work.extrapolates:
            raise Unsuitable(untraceable(error)) from error
        found = [by_arithmetic(work.case, device, work.threads, scratch, error)]
    highest = max(found, key=lambda each: each.figures.get("peak_live_bytes", 0))
    result = Result(pinned=False, estimates=found, breakdown_bytes=highest.breakdown_bytes, peak_part=highest.peak_part)
    meter.send(ResultSoFar(result))
