"""Refusing baselines that fit the schema but that no measurement can have produced."""

from __future__ import annotations

from membench.errors import ResultsError
from membench.records.metrics import is_possible_value
from membench.records.names import checked_device, checked_name
from membench.records.schema import check_machine
from membench.records.validation import shown
from membench.regression.measured import Measured, MeasuredCase, is_duration_of_a_step

_LARGEST = 2.0**63


def refuse_impossible(measured: Measured) -> None:
    """Refuse a baseline that no measurement can have produced.

    Raises:
        ResultsError: the field, and what is wrong with it.
    """
    try:
        check_machine(measured.machine)
        if measured.suite:  # functions and scripts have none
            checked_name(measured.suite)
    except ResultsError as error:
        raise ResultsError(f"damaged: machine.{error}") from None
    except ValueError as error:
        raise ResultsError(f"damaged: suite = {shown(measured.suite)}: {error}") from None
    for case_id, case in measured.cases.items():
        if case_id != case.id or not case_id.isprintable():
            raise ResultsError(f"damaged: case {shown(case_id)} calls itself {shown(case.id)}")
        if case.is_measured and not case.values:
            raise ResultsError(f"damaged: case {shown(case_id)} ended well and has no figures")
        steps = [len(repeat) for repeat in case.samples.get("step_median_s", ())]
        if case.waited_s and [len(repeat) for repeat in case.waited_s] != steps:
            raise ResultsError(f"damaged: cases.{case_id}.waited_s is not of the steps in samples")
        try:
            checked_device(case.device)
        except ValueError as error:
            raise ResultsError(f"damaged: cases.{case_id}.device = {shown(case.device)}: {error}") from None
        if wrong := _impossible(case):
            raise ResultsError(f"damaged: cases.{case_id}.{wrong} holds nothing that was measured")
        for name, values in case.values.items():
            if not values or not all(is_possible_value(name, value) for value in values):
                raise ResultsError(f"damaged: cases.{case_id}.values.{name} holds nothing that was measured")
    for case_id, spreads in measured.noise.spreads.items():
        for name, spread in spreads.items():
            told = (spread.range, spread.median or 0)
            if spread.runs < 2 or spread.range < 0 or not all(is_possible_value(name, one) for one in told):
                raise ResultsError(f"damaged: noise.{case_id}.{name} is no spread of two runs or more")


def _impossible(case: MeasuredCase) -> str | None:
    """Return the field of a case that no measurement can have produced, if there is one."""
    modules = case.modules or ()
    sizes = {
        "resolution_bytes": case.resolution_bytes.values(),
        "breakdown_bytes": (size for of_part in case.breakdown_bytes.values() for size in of_part.values()),
        "modules": (number for each in modules for number in (each.bytes, each.count)),
        "phases": (size for of_phase in case.phases.values() for size in of_phase.values()),
    }
    for name, found in sizes.items():
        if any(abs(size) > _LARGEST for size in found):
            return name
    if any(each.count < 1 for each in modules):
        return "modules"
    if any(not {"peak_live_bytes", "held_live_bytes"} <= set(of_phase) for of_phase in case.phases.values()):
        return "phases"
    for name, repeats in case.samples.items():
        if not repeats or any(not repeat or not all(map(is_duration_of_a_step, repeat)) for repeat in repeats):
            return f"samples.{name}"
    return None
