"""Suites with cases on ranks: which cases they have, and what each is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from membench.errors import SuiteError
from membench.protocol.case import Case
from membench.records.comparison import Comparison, with_compared
from membench.records.disturbed_times import is_disturbed_time
from membench.records.metrics import METRIC_OF_FIELD
from membench.records.record import Record
from membench.regression.measured import of_records
from membench.report import cells, savings, summary, text
from membench.report.advice import advise
from membench.report.page import page
from membench.running.derived_metrics import DerivedMetrics
from membench.running.jobs.case import case_names
from membench.running.over_ranks import combine, say_that_cores_are_shared
from membench.running.references import References
from membench.suite import catalog, gates
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


_ALONE_IN_TIME = made_up.record(
    "none", "train", peak_live_bytes=100 * MIB, step_median_s=1.0, tokens_per_s=100.0, final_loss_nats=5.0
)


def _in_time(technique: str, peak_mib: float, tokens_per_s: float, device: str = "2xcpu") -> Record:
    return made_up.record(
        technique, "train", device=device, peak_live_bytes=peak_mib * MIB, step_median_s=100 / tokens_per_s,
        tokens_per_s=tokens_per_s, final_loss_nats=5.0,
    )  # fmt: skip


def test_times_of_ranks_that_share_cores_support_no_conclusion() -> None:
    records = [_ALONE_IN_TIME, _in_time("fsdp", 50, 20.0), _in_time("ddp", 110, 300.0)]
    found = Comparison(records)
    assert savings.verdicts(records) == [
        "fsdp: saved live peak ×0.50; cost nothing",
        "ddp: saved nothing; cost live peak ×1.10",
    ]
    assert found.front(_ON_RANKS) == {"fsdp"}, "that ddp is faster on shared cores gives it no place"
    assert found.pace_s(_ON_RANKS, "fsdp") is None
    (row,) = (row for row in text.comparison(records).splitlines() if row.startswith("fsdp"))
    assert "~5.00 s ~×5.00" in row
    assert "its time not known because its ranks share the cores of one machine" in summary.sentence(
        found, _ON_RANKS, "fsdp"
    )
    (said,) = (line for line in text.remarks(records) if "cluster" in line)
    assert said.startswith("2xcpu: 2 ranks share the cores of one machine: their memory is true, their times are not")


def test_times_of_ranks_that_have_a_gpu_each_count() -> None:
    records = [
        made_up.record("none", "train", device="cuda", peak_live_bytes=100 * MIB, tokens_per_s=100.0),
        _in_time("ddp", 110, 190.0, "2xcuda"),
    ]
    assert Comparison(records).front(("m", "train", "2xcuda")) == {"none", "ddp"}
    assert not [line for line in text.remarks(records) if "cluster" in line]


def test_a_rule_does_not_hold_a_time_on_shared_cores_against_a_single_device() -> None:
    rules = [gates.parse("time <= 2 * reference"), gates.parse("time <= 10 s")]
    relative, absolute = gates.outcomes(rules, [_ALONE_IN_TIME, _in_time("fsdp", 50, 20.0)])[0:3:2]
    assert (relative.holds, relative.reason) == (
        None, "time of the case says nothing beside the reference's: its ranks share the cores of one machine",
    )  # fmt: skip
    assert absolute.holds


def test_a_record_says_of_each_time_that_its_ranks_shared_cores() -> None:
    found = DerivedMetrics()
    found.add("step_median_s", 1.0, "monotonic clock")
    found.add("peak_live_bytes", MIB, "kernel's peak")
    say_that_cores_are_shared(found, 2, 1)
    assert [how["source"] for how in found.obtained.values()] == [
        "monotonic clock; 2 ranks shared the cores of one machine, 1 thread each", "kernel's peak",
    ]  # fmt: skip


def test_the_rank_that_needs_most_is_named_where_ranks_differ() -> None:
    def rank(peak_bytes: int) -> DerivedMetrics:
        found = DerivedMetrics()
        found.add("peak_live_bytes", peak_bytes, "kernel's peak")
        return found

    def shown(*peaks_bytes: int) -> str:
        combined = combine([rank(peak_bytes) for peak_bytes in peaks_bytes])
        record = made_up.record("pp", "train", device="2xcpu", obtained=combined.obtained)
        record = dataclasses.replace(record, metrics=combined.metrics)
        return cells.figure(Comparison([record]), _ON_RANKS, "pp", METRIC_OF_FIELD["imbalance_ratio"])

    assert shown(10 * MIB, 30 * MIB) == "1.500 (rank 1)"
    assert shown(30 * MIB, 30 * MIB) == "1.000"


def test_what_holds_memory_is_told_of_the_rank_that_needs_most() -> None:
    processes = tuple(
        made_up.process(rank=rank, peak_part="backward", breakdown_bytes={"backward": {"activations": size}})
        for rank, size in enumerate((10 * MIB, 30 * MIB))
    )
    record = dataclasses.replace(
        made_up.record(
            "pp", "train", device="2xcpu", peak_live_bytes=30 * MIB, obtained={"peak_live_bytes": {"rank": 0}}
        ),
        processes=processes,
    )
    assert "10.00 MiB" in text.explanation([_ALONE, record])
    assert of_records([record], "now").cases[record.id].breakdown_bytes == {"backward": {"activations": 10 * MIB}}


def test_a_case_is_disturbed_if_one_of_its_ranks_is() -> None:
    calm, disturbed = (made_up.process(durations_s=[1.0, 1.0], waited_s=[waited, waited]) for waited in (0.0, 0.9))
    assert is_disturbed_time("step_median_s", [calm, disturbed])
    assert not is_disturbed_time("step_median_s", [calm, calm])


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        ("2xgpu", "write cpu, cuda, cuda:0 or 2xcpu"),
        ("2xcuda:1", "write cpu, cuda, cuda:0 or 2xcpu"),
        ("0xcpu", "write cpu, cuda, cuda:0 or 2xcpu"),
        ("65xcpu", "at most 64 ranks run on the cores of one machine: 64xcpu"),
    ],
)
def test_a_device_that_there_is_not_is_one_line(tmp_path: Path, device: str, problem: str) -> None:
    with pytest.raises(SuiteError) as caught:
        _suite(tmp_path, ["ddp"], [device])
    assert str(caught.value).endswith(f"matrix.device.0 = '{device}': {problem}")


def test_techniques_that_spread_a_case_are_listed_with_a_count() -> None:
    assert "  runs on  2xcpu, 2xcuda, …" in catalog.details("ddp")


def test_what_was_judged_over_other_text_has_no_ratio() -> None:
    def judged(technique: str, device: str, tokens: int) -> Record:
        quality = {"nats": [1.0], "tokens": [tokens], "bytes": [tokens]}
        quality |= {"all_pieces": 2} if tokens < 100 else {}
        record = made_up.record(technique, "train", device=device, bits_per_byte=2.0)
        return dataclasses.replace(record, processes=(made_up.process(quality=quality),))

    alone, same, less = judged("none", "cpu", 100), judged("ddp", "2xcpu", 100), judged("fsdp", "2xcpu", 50)
    found = Comparison([alone, same, less])
    assert found.ratio(_ON_RANKS, "ddp", "bits_per_byte") == 1.0
    assert found.ratio(_ON_RANKS, "fsdp", "bits_per_byte") is None


def test_advice_and_page_say_on_which_device_the_reference_ran() -> None:
    none, in_ranks = (
        made_up.record(name, "train", device=device, peak_footprint_bytes=10 * MIB, peak_live_bytes=10 * MIB)
        for name, device in (("none", "cpu"), ("fsdp", "2xcpu"))
    )
    records = [none, in_ranks]
    (advice,) = advise(records, 5 * MIB)
    assert [name for name, _ in advice.others] == ["none (cpu)", "fsdp"]
    assert "none (cpu)" in page([made_up.run(records)])
