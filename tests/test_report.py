"""Tables and verdicts out of records, exactly as they are printed."""

from __future__ import annotations

import dataclasses

import pytest

from membench.record import Record
from membench.report import text

MIB = 2**20


def _record(technique: str, workload: str = "forward", **metrics: float | None) -> Record:
    case = {"model": "m", "technique": technique, "workload": workload, "device": "cpu"}
    return Record(
        case=case, id=f"m/{technique}/{workload}/cpu", repeat=0, status="ok", ended_in=None, message=None,
        started_at="", duration_s=1.0, metrics=metrics, reasons={}, obtained={}, processes=(), remarks=(), notes=(),
        broken_limits=(), timeline={}, output_tail="", machine={}, settings={},
    )  # fmt: skip


_RECORDS = (
    _record("none", weights_bytes=64 * MIB, step_median_s=0.5, tokens_per_s=512),
    _record("half", weights_bytes=32 * MIB, step_median_s=1.0, tokens_per_s=256),
)


def test_a_table_shows_each_figure_with_its_ratio_to_the_reference() -> None:
    assert text.comparison(_RECORDS) == (
        "m · forward · cpu\n"
        "\n"
        "technique    status    weights          time          tokens/s\n"
        "-----------  --------  ---------------  ------------  -----------\n"
        "none         ok        64.00 MiB        500 ms        512.0\n"
        "half         ok        32.00 MiB ×0.50  1.00 s ×2.00  256.0 ×0.50"
    )


def test_a_table_wider_than_the_terminal_goes_on_below() -> None:
    assert text.comparison(_RECORDS, width=60) == (
        "m · forward · cpu\n"
        "\n"
        "technique    status    weights          time\n"
        "-----------  --------  ---------------  ------------\n"
        "none         ok        64.00 MiB        500 ms\n"
        "half         ok        32.00 MiB ×0.50  1.00 s ×2.00\n"
        "\n"
        "technique    status    tokens/s\n"
        "-----------  --------  -----------\n"
        "none         ok        512.0\n"
        "half         ok        256.0 ×0.50"
    )


def test_even_the_narrowest_terminal_gets_every_column() -> None:
    shown = text.comparison(_RECORDS, width=1)
    assert [title in shown for title in ("weights", "time", "tokens/s")] == [True, True, True]


def test_a_figure_that_is_not_known_is_a_dash_without_a_ratio() -> None:
    unknown = dataclasses.replace(_RECORDS[1], metrics={"weights_bytes": None, "step_median_s": 1.0})
    assert text.comparison((_RECORDS[0], unknown)).splitlines()[-1] == (
        "half         ok        –          1.00 s ×2.00  –"
    )


@pytest.mark.parametrize(
    ("elsewhere_s", "line"),
    [
        (2.0, "half: saved weights ×0.50; cost time ×2.00 to ×4.00"),
        (0.25, "half: saved weights ×0.50; cost nothing; depends on the case: time ×0.50 to ×2.00"),
    ],
)
def test_a_verdict_names_what_was_saved_and_what_it_cost(elsewhere_s: float, line: str) -> None:
    records = (
        _record("none", weights_bytes=64, step_median_s=0.5),
        _record("half", weights_bytes=32, step_median_s=1.0),
        _record("none", "train", weights_bytes=64, step_median_s=0.5),
        _record("half", "train", weights_bytes=32, step_median_s=elsewhere_s),
    )
    assert text.verdicts(records) == [line]
