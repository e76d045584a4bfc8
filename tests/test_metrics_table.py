"""The table of metrics is the one place that says what a metric is; readers guess nothing from its name."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import membench
from membench.records.metric import Dependence, Role, own_field
from membench.records.metrics import METRIC_OF_FIELD, METRICS, PEAK_OF_PHASE
from membench.suite.tolerances import DEFAULTS
from membench.units import BYTES, SECONDS

_OWN = METRIC_OF_FIELD[own_field("sharpness", "higher", "nats")]


def test_every_field_ends_in_its_metrics_unit() -> None:
    assert [metric.field for metric in (*METRICS, _OWN) if not metric.field.endswith(metric.unit.suffix)] == []
    with pytest.raises(ValueError, match="metric 'weights': its field 'weights_bytes' must end in '_s'"):
        dataclasses.replace(METRIC_OF_FIELD["weights_bytes"], unit=SECONDS)


def test_every_metric_says_what_its_figure_depends_on_and_what_it_tells() -> None:
    for metric in (*METRICS, _OWN):
        assert metric.depends_on in typing.get_args(Dependence), metric.field
        assert metric.role in typing.get_args(Role), metric.field
        assert (metric.role in ("time", "rate", "energy")) == (metric.depends_on == "time"), metric.field


def test_names_and_fields_are_of_one_metric_each() -> None:
    for values in ([metric.name for metric in METRICS], [metric.field for metric in METRICS]):
        assert len(set(values)) == len(values)


def test_a_peak_of_a_phase_is_live_memory_and_each_phase_has_one() -> None:
    assert all(metric.unit is BYTES and metric.depends_on == "live" for metric in METRICS if metric.peak_of)
    assert [metric.peak_of for metric in PEAK_OF_PHASE.values()] == list(PEAK_OF_PHASE)


def test_what_is_watched_by_default_is_what_the_table_gives_a_tolerance() -> None:
    assert {one.metric.name: one.amount for one in DEFAULTS} == {
        metric.name: metric.tolerance for metric in METRICS if metric.tolerance is not None
    }


def test_the_standard_error_of_a_loss_is_a_metric_in_the_same_unit() -> None:
    for metric in METRICS:
        if metric.loss and metric.loss.error_field:
            assert metric.unit.expected == METRIC_OF_FIELD[metric.loss.error_field].unit.expected


def _ends_asked_for(file: Path) -> Iterator[str]:
    """The constants that a module looks for at the ends of strings."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in ("endswith", "removesuffix"):
            constants = (inner for argument in node.args for inner in ast.walk(argument))
            yield from (str(inner.value) for inner in constants if isinstance(inner, ast.Constant))


def test_no_module_guesses_anything_from_the_end_of_a_metrics_field() -> None:
    ends = {metric.unit.suffix for metric in METRICS} | {"_live_bytes", "_footprint_bytes", "_per_s", "standard_error"}
    files = list(Path(membench.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [(file.name, end) for file in files for end in _ends_asked_for(file) if end in ends] == []
