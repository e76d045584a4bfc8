"""The live peak of a step over what is held after it: when it is exact, a bound, or not known."""

from __future__ import annotations

from typing import Any

import pytest

from membench.records.metrics import METRICS
from membench.records.record import Record
from membench.report.text import comparison, explanation
from membench.running.derived_metrics import DerivedMetrics
from tests import made_up

GIB = 2**30
_FIELD = "peak_over_held_ratio"


def _figures(*, pinned: bool = True, **run: Any) -> DerivedMetrics:
    phase = {"duration_s": 1.0, "parts": {}, "steps": 2, "peak_live_bytes": 6 * GIB,
             "peak_live_at_least_bytes": 6 * GIB, "peak_footprint_bytes": 1, "held_live_bytes": 4 * GIB,
             "held_footprint_bytes": 1}  # fmt: skip
    phases = [{"name": name, **phase} for name in ("load", "apply", "warmup", "run", "time")]
    phases[3] |= run
    result = {"weights_bytes": 1, "pinned": pinned, "disk_bytes": 1, "disk_format": "safetensors", "losses_nats": [],
              "durations_s": [1.0, 1.0], "tokens_per_step": 4, "decoded_tokens": None, "is_trained": False}  # fmt: skip
    return made_up.case_figures(phases, result)


def test_the_ratio_of_two_exact_sizes_is_exact() -> None:
    found = _figures()
    assert found.metrics[_FIELD] == 1.5
    assert found.obtained[_FIELD] == {"source": "live peak over live held", "bound": "exact"}


def test_the_ratio_of_a_peak_that_is_a_bound_is_one() -> None:
    found = _figures(peak_live_at_least_bytes=5 * GIB)
    assert (found.metrics[_FIELD], found.obtained[_FIELD]["bound"]) == (1.5, "at most")


@pytest.mark.parametrize("held_bytes", [-4096, 0, 4096])
def test_over_what_cannot_be_told_from_nothing_there_is_no_ratio(held_bytes: int) -> None:
    found = _figures(held_live_bytes=held_bytes)
    assert found.metrics[_FIELD] is None
    assert "too little to be told from nothing" in found.reasons[_FIELD]


def test_without_a_live_peak_the_reason_is_the_peaks() -> None:
    found = _figures(pinned=False)
    assert found.metrics[_FIELD] is None
    assert found.reasons[_FIELD] == found.reasons["peak_live_bytes"]


def _record(technique: str, ratio: float) -> Record:
    case = {"model": "m", "technique": technique, "workload": "train", "device": "cpu"}
    return Record(
        case=case, id=f"m/{technique}/train/cpu", repeat=0, status="ok", ended_in=None, message=None,
        started_at="", duration_s=1.0, metrics={_FIELD: ratio}, reasons={}, obtained={}, processes=(), remarks=(),
        notes=(), broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


def test_it_is_shown_by_explain_and_not_in_the_comparison() -> None:
    (metric,) = (metric for metric in METRICS if metric.field == _FIELD)
    records = [_record("none", 3.5), _record("remat", 1.25)]
    assert metric.title not in comparison(records)
    *_, line = (line for line in explanation(records).splitlines() if line.startswith(metric.title))
    assert line.split()[-2:] == ["3.500", "1.250"]
