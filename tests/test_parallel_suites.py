"""Suites with cases on ranks: which cases they have, and what each is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from membench.protocol.case import Case
from membench.records.comparison import Comparison, with_compared
from membench.report import savings, text
from membench.running.jobs.case import case_names
from membench.running.references import References
from membench.suite import gates
from membench.suite.loading import load_suite
from membench.suite.suite import Suite
from tests import made_up
from tests.made_up import MIB

_PLUGINS = '''
from typing import ClassVar
from membench.plugins import Dimension, Parallel

class Shard(Parallel):
    """Splits tensors."""
    dimension: ClassVar[Dimension] = "tensor"
    splits_model: ClassVar[bool] = True
    def parallelize(self, module, context):
        return module
'''


def _suite(folder: Path, technique: list[str], device: list[str], more: str = "") -> Suite:
    (folder / "membench_plugins.py").write_text(_PLUGINS)
    (folder / "s.toml").write_text(
        f'[suite]\nname = "s"\n[matrix]\nmodel = ["untrained-tiny"]\ntechnique = {technique}\n'
        f'workload = ["train"]\ndevice = {device}\n{more}'
    )
    return load_suite(folder / "s.toml")


def _ids(cases: tuple[Case, ...]) -> list[str]:
    return [f"{case.technique}/{case.device}" for case in cases]


def test_the_reference_of_ranks_runs_on_a_single_device_and_none_is_never_a_case_of_ranks(tmp_path: Path) -> None:
    suite = _suite(tmp_path, ["none", "ddp"], ["2xcpu"])
    assert _ids(suite.cases) == ["none/cpu", "ddp/2xcpu"]
    assert suite.cases[1].id == "untrained-tiny/ddp/train/2xcpu"
    assert _ids(_suite(tmp_path, ["none"], ["2xcpu"]).cases) == ["none/cpu"]
    assert _ids(_suite(tmp_path, ["ddp"], ["4xcuda"]).cases) == ["none/cuda", "ddp/4xcuda"]


def test_a_suite_on_a_single_device_and_on_ranks_has_one_reference_and_it_comes_first(tmp_path: Path) -> None:
    suite = _suite(tmp_path, ["none", "bf16", "ddp"], ["2xcpu", "cpu"])
    assert _ids(suite.cases) == ["none/cpu", "bf16/cpu", "ddp/cpu", "bf16/2xcpu", "ddp/2xcpu"]


def test_included_cases_and_other_devices_get_their_references_too(tmp_path: Path) -> None:
    include = (
        '[[include]]\nmodel = "untrained-tiny"\ntechnique = ["none", "ddp"]\nworkload = "train"\ndevice = "2xcpu"\n'
    )
    suite = _suite(tmp_path, ["bf16"], ["cuda"], include)
    assert _ids(suite.cases) == ["none/cuda", "bf16/cuda", "none/cpu", "ddp/2xcpu"]
    assert _ids(_suite(tmp_path, ["ddp"], ["cpu"]).on(["4xcpu"]).cases) == ["none/cpu", "ddp/4xcpu"]


def test_a_member_that_spreads_nothing_is_compared_on_the_single_device(tmp_path: Path) -> None:
    suite = _suite(tmp_path, ["bf16+ddp"], ["2xcpu"])
    assert _ids(suite.cases) == ["none/cpu", "bf16/cpu", "ddp/2xcpu", "bf16+ddp/2xcpu"]
    assert case_names(suite.cases[-1])["part_devices"] == {"bf16": "cpu"}
    # The stack without what spreads it is the same training on one device, wherever it stands in the stack.
    assert "bf16+checkpointing/cpu" in _ids(_suite(tmp_path, ["bf16+ddp+checkpointing"], ["2xcpu"]).cases)


def test_a_member_of_a_mesh_is_compared_on_as_many_ranks_as_it_has_there(tmp_path: Path) -> None:
    suite = _suite(tmp_path, ["ddp+Shard"], ["4xcpu"], '[technique.Shard]\nuse = "shard"\n')
    assert _ids(suite.cases) == ["none/cpu", "ddp/2xcpu", "Shard/2xcpu", "ddp+Shard/4xcpu"]


@pytest.mark.parametrize(
    ("stack", "device"),
    [("bf16+checkpointing", "2xcpu"), ("bf16+ddp", "cpu"), ("ddp+Shard", "3xcpu"), ("ddp+Shard", "2xcpu")],
)
def test_parts_are_not_added_of_a_stack_that_cannot_run_there(tmp_path: Path, stack: str, device: str) -> None:
    suite = _suite(tmp_path, [stack], [device], '[technique.Shard]\nuse = "shard"\n')
    assert _ids(suite.cases) == ["none/cpu", f"{stack}/{device}"]


def test_selecting_a_case_on_ranks_keeps_what_it_is_compared_with(tmp_path: Path) -> None:
    suite = _suite(tmp_path, ["bf16+ddp", "checkpointing"], ["2xcpu", "cpu"])
    chosen = suite.select(lambda case_id: "bf16+ddp" in case_id and "2xcpu" in case_id)
    assert _ids(chosen) == ["none/cpu", "bf16/cpu", "ddp/2xcpu", "bf16+ddp/2xcpu"]


def test_ranks_read_the_logits_that_the_single_device_wrote(tmp_path: Path) -> None:
    reference, in_ranks = _suite(tmp_path, ["ddp"], ["2xcpu"]).cases
    files = References(tmp_path)
    assert files.of(in_ranks).path == files.of(reference).path
    assert [files.of(case).is_written_here for case in (reference, in_ranks)] == [True, False]


_ALONE = made_up.record("none", "train", peak_live_bytes=100 * MIB)
_SHARDED = made_up.record(
    "fsdp", "train", device="2xcpu", peak_live_bytes=52 * MIB, total_peak_live_bytes=104 * MIB, imbalance_ratio=1.0
)
_ON_RANKS = ("m", "train", "2xcpu")


def test_each_rank_and_the_job_in_all_are_held_against_the_single_device() -> None:
    found = Comparison([_ALONE, _SHARDED])
    assert found.groups == [_ON_RANKS], "the reference alone is no table of its own"
    assert found.techniques(_ON_RANKS) == ["none", "fsdp"]
    assert found.ratio(_ON_RANKS, "fsdp", "peak_live_bytes") == 0.52
    assert found.ratio(_ON_RANKS, "fsdp", "total_peak_live_bytes") == 1.04


def test_a_table_of_ranks_says_on_which_device_its_reference_ran() -> None:
    rows = text.comparison([_ALONE, _SHARDED]).splitlines()
    assert rows[0] == "m · train · 2xcpu"
    (none,) = (row.split("  ") for row in rows if row.startswith("none"))
    assert none[0] == "none (cpu)"
    (fsdp,) = (row for row in rows if row.startswith("fsdp"))
    assert fsdp.split()[2:] == ["52.00", "MiB", "×0.52", "104.0", "MiB", "×1.040", "1.000"]
    assert savings.verdicts([_ALONE, _SHARDED]) == ["fsdp: saved live peak ×0.52; cost total peak ×1.040"]


def test_the_single_device_keeps_a_table_of_its_own_without_totals() -> None:
    other = made_up.record("bf16", "train", peak_live_bytes=60 * MIB)
    found = Comparison([_ALONE, other, _SHARDED])
    assert found.groups == [("m", "train", "cpu"), _ON_RANKS]
    assert not found.is_known(("m", "train", "cpu"), "total_peak_live_bytes")


def test_a_gpu_is_never_the_reference_of_processors() -> None:
    on_gpus = made_up.record("fsdp", "train", device="2xcuda", peak_live_bytes=52 * MIB)
    found = Comparison([_ALONE, on_gpus])
    assert found.ratio(("m", "train", "2xcuda"), "fsdp", "peak_live_bytes") is None


def test_members_of_a_mesh_are_taken_together_as_they_ran_in_it() -> None:
    records = [
        _ALONE,
        made_up.record("ddp", "train", device="2xcpu", peak_live_bytes=50 * MIB),
        made_up.record("ddp", "train", device="4xcpu", peak_live_bytes=25 * MIB),
        made_up.record("tp", "train", device="2xcpu", peak_live_bytes=40 * MIB),
        made_up.record(
            "ddp+tp", "train", device="4xcpu", parts={"ddp": "2xcpu", "tp": "2xcpu"}, peak_live_bytes=30 * MIB
        ),
    ]
    found, group = Comparison(records), ("m", "train", "4xcpu")
    assert found.interaction(group, "ddp+tp", "peak_live_bytes") == pytest.approx(0.3 / (0.5 * 0.4))
    assert found.ratio(group, "ddp", "peak_live_bytes") == 0.25, "in the table of four ranks, ddp is that of four"
    rows = text.comparison(records).split("4xcpu")[1].splitlines()
    assert [row.split()[-1] for row in rows if row.startswith("· ")] == ["×0.50", "×0.60"]
    kept = with_compared(records, records[-1:])
    assert [record.id for record in kept] == [
        "m/none/train/cpu", "m/ddp/train/2xcpu", "m/tp/train/2xcpu", "m/ddp+tp/train/4xcpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("peak_live <= 0.6 * reference", True),
        ("peak_live <= 0.5 * reference", False),
        ("total_peak_live <= 1.05 * reference", True),
        ("total_peak_live <= 1.03 * reference", False),
    ],
)
def test_rules_hold_ranks_against_the_reference_of_the_single_device(rule: str, holds: bool) -> None:
    outcome = gates.outcomes([gates.parse(rule)], [_ALONE, _SHARDED])[0]
    assert (outcome.case_id, outcome.holds) == ("m/fsdp/train/2xcpu", holds)
