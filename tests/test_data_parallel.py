"""Data parallel techniques on two ranks: what each holds, by arithmetic, and that it is the same training."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from membench.builtin.techniques.parallel.data_parallel import DistributedDataParallel
from membench.plugins import Setting, Technique, parallel_last, registry
from membench.records.record import Record
from membench.running.derived_metrics import resolution_bytes
from membench.worker.training import note_on_more_steps, steps_for_memory
from tests import parallel
from tests.parallel import LAYER_BYTES, LAYERS, WEIGHTS_BYTES

_OVERHEAD_BYTES = 2**19
"""Of small objects, and of pages that are not full."""

_SUITE = """
[suite]
name = "data-parallel"
[matrix]
model = ["small"]
technique = [
    "ddp", "ddp-views", "ddp-powersgd", "zero1", "fsdp", "fsdp-sharded", "fsdp-root", "accumulate-2+fsdp",
    "accumulate-2+fsdp-late", "lora+fsdp", "lora+fsdp-root",
]
workload = ["brief"]
device = ["2xcpu"]
[[exclude]]
technique = ["accumulate-2", "fsdp-late", "lora"]
[workload.brief]
use = "train"
batch_size = 4
sequence_length = 64
[technique]
ddp-views = {use = "ddp", gradient_as_bucket_view = true, checkpoint = "sharded"}
ddp-powersgd = {use = "ddp", gradient_as_bucket_view = true, hook = "powersgd"}
fsdp-sharded = {use = "fsdp", checkpoint = "sharded"}
fsdp-root = {use = "fsdp", wrap = "root"}
fsdp-late = {use = "fsdp", sync = "step"}
"""

_WHOLE = ("ddp", "ddp-views", "ddp-powersgd", "zero1")
_SHARDED = ("fsdp", "fsdp-sharded", "fsdp-root", "accumulate-2+fsdp", "accumulate-2+fsdp-late")
Records = dict[str, Record]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    found = parallel.run(_SUITE, tmp_path_factory.mktemp("data-parallel"))
    return {record.technique: record for record in found.values()}


def _bytes(record: Record, field: str) -> float:
    value = record.metrics[field]
    assert value is not None, record.reasons.get(field)
    return value


def _save_peaks(record: Record) -> list[int]:
    """Return the live peak of saving on each rank."""
    peaks = [phase.live_peak_bytes for process in record.processes if (phase := process.phase("save")) is not None]
    return [peak for peak in peaks if peak is not None]


@pytest.mark.parametrize(
    ("technique", "share"), [(name, 1) for name in _WHOLE] + [(name, 0.5) for name in _SHARDED]
)  # fmt: skip
def test_each_rank_holds_its_share_of_weights_and_gradients(records: Records, technique: str, share: float) -> None:
    record = records[technique]
    assert record.status == "ok", record.message
    assert _bytes(record, "weights_bytes") == pytest.approx(share * WEIGHTS_BYTES, rel=0.005)
    assert _bytes(record, "trained_weights_bytes") == pytest.approx(share * WEIGHTS_BYTES, rel=0.005)
    for process in record.processes:
        assert process.breakdown_bytes is not None
        gradients_bytes = process.breakdown_bytes["optimizer"]["gradients"]
        assert gradients_bytes == pytest.approx(share * WEIGHTS_BYTES, rel=0.005)


@pytest.mark.parametrize(
    ("technique", "share"),
    [(name, 1) for name in _WHOLE if name != "zero1"] + [(name, 0.5) for name in ("zero1", *_SHARDED)],
)
def test_each_rank_holds_its_share_of_the_optimizer_states(records: Records, technique: str, share: float) -> None:
    for process in records[technique].processes:
        assert process.breakdown_bytes is not None
        states_bytes = process.breakdown_bytes["optimizer"]["optimizer"]
        assert states_bytes == pytest.approx(share * 2 * WEIGHTS_BYTES, rel=0.005)


def test_ddp_holds_gradients_twice_and_with_views_of_its_buckets_once(records: Records) -> None:
    held = {name: _bytes(records[name], "held_live_bytes") for name in ("none", "ddp", "ddp-views")}
    assert held["ddp"] - held["none"] == pytest.approx(WEIGHTS_BYTES, abs=_OVERHEAD_BYTES)
    assert held["ddp-views"] - held["none"] == pytest.approx(0, abs=_OVERHEAD_BYTES)


def test_views_lower_the_peak_of_the_optimizer_by_a_copy_of_the_gradients(records: Records) -> None:
    without, with_views = (_bytes(records[name], "optimizer_peak_live_bytes") for name in ("ddp", "ddp-views"))
    # Each of the two peaks may be off by as much as the kernel's counter is.
    assert without - with_views == pytest.approx(WEIGHTS_BYTES, abs=_OVERHEAD_BYTES + 2 * resolution_bytes())


def test_wrapping_for_ddp_holds_the_weights_twice(records: Records) -> None:
    allowed_bytes = _OVERHEAD_BYTES + resolution_bytes()
    assert _bytes(records["none"], "apply_peak_live_bytes") == pytest.approx(WEIGHTS_BYTES, abs=allowed_bytes)
    assert _bytes(records["ddp"], "apply_peak_live_bytes") == pytest.approx(2 * WEIGHTS_BYTES, abs=allowed_bytes)


def test_every_rank_builds_the_whole_model_before_it_is_sharded(records: Records) -> None:
    for process in records["fsdp"].processes:
        load = process.phase("load")
        assert load is not None
        assert load.live_peak_bytes is not None
        assert load.live_peak_bytes >= WEIGHTS_BYTES


def test_powersgd_keeps_one_more_copy_of_the_gradients(records: Records) -> None:
    compressed, plain = (_bytes(records[name], "held_live_bytes") for name in ("ddp-powersgd", "ddp-views"))
    assert compressed - plain == pytest.approx(WEIGHTS_BYTES, rel=0.1)


def test_zero1_holds_half_the_states_less_than_ddp_does(records: Records) -> None:
    saved = _bytes(records["ddp"], "held_live_bytes") - _bytes(records["zero1"], "held_live_bytes")
    assert saved == pytest.approx(WEIGHTS_BYTES, abs=_OVERHEAD_BYTES)


def test_fsdp_holds_half_of_all_that_training_holds(records: Records) -> None:
    for name in ("fsdp", "fsdp-root"):
        assert _bytes(records[name], "held_live_bytes") == pytest.approx(2 * WEIGHTS_BYTES, abs=3 * _OVERHEAD_BYTES)


def test_fsdp_as_one_group_gathers_all_layers_at_once(records: Records) -> None:
    by_layer, as_one = (_bytes(records[name], "peak_live_bytes") for name in ("fsdp", "fsdp-root"))
    # By layer, two layers at most are gathered, and their gradients are there: the others' weights are the difference.
    assert as_one - by_layer > (LAYERS - 2) * LAYER_BYTES
    assert as_one > _bytes(records["fsdp"], "held_live_bytes") + WEIGHTS_BYTES


def test_adapters_are_wrapped_by_layers_and_gather_no_more_than_those(records: Records) -> None:
    by_layer, as_one = (_bytes(records[name], "peak_live_bytes") for name in ("lora+fsdp", "lora+fsdp-root"))
    # Of frozen weights nothing is reduced: a layer that is dropped leaves nothing.
    assert as_one - by_layer > (LAYERS - 2) * LAYER_BYTES
    # Half the weights, and what training adapters takes; the weights are nowhere whole.
    assert WEIGHTS_BYTES / 2 < _bytes(records["lora+fsdp"], "held_live_bytes") < WEIGHTS_BYTES


def test_the_peak_of_fsdp_repeats(records: Records) -> None:
    first, second = (_bytes(records[name], "peak_live_bytes") for name in ("fsdp", "fsdp-sharded"))
    resolution_bytes = records["fsdp"].obtained["peak_live_bytes"]["resolution_bytes"]
    # At this size the kernel's own counting decides, by which each of the two may be off.
    assert first == pytest.approx(second, rel=0.002, abs=2 * resolution_bytes)


@pytest.mark.parametrize(("technique", "share"), [("accumulate-2+fsdp", 0.5), ("accumulate-2+fsdp-late", 1)])
def test_gradients_reduced_once_a_step_are_whole_on_each_rank_between_micro_batches(
    records: Records, technique: str, share: float
) -> None:
    for process in records[technique].processes:
        assert process.breakdown_bytes is not None
        gradients_bytes = process.breakdown_bytes["forward"]["gradients"]
        assert gradients_bytes == pytest.approx(share * WEIGHTS_BYTES, rel=0.005)


def test_a_gathered_checkpoint_is_whole_on_the_first_rank_and_a_sharded_one_on_none(records: Records) -> None:
    first, other = _save_peaks(records["fsdp"])
    held_bytes = _bytes(records["fsdp"], "held_live_bytes")
    assert first - held_bytes > WEIGHTS_BYTES
    assert other - held_bytes < WEIGHTS_BYTES
    assert max(_save_peaks(records["fsdp-sharded"])) - held_bytes < WEIGHTS_BYTES / 4
    record = records["fsdp"]
    assert record.metrics["save_peak_live_bytes"] == first
    assert record.obtained["save_peak_live_bytes"]["rank"] == 0


@pytest.mark.parametrize("technique", [*_WHOLE, *_SHARDED])
def test_a_checkpoint_has_all_weights_whoever_writes_it(records: Records, technique: str) -> None:
    assert _bytes(records[technique], "disk_bytes") == pytest.approx(WEIGHTS_BYTES, rel=0.02)


@pytest.mark.parametrize("technique", [*(name for name in _WHOLE if name != "ddp-powersgd"), *_SHARDED])
def test_the_mean_loss_over_ranks_is_that_of_one_device(records: Records, technique: str) -> None:
    alone = records["none"].processes[0].losses_nats
    by_rank = [process.losses_nats or () for process in records[technique].processes]
    assert alone
    for step, (expected, *found) in enumerate(zip(alone, *by_rank, strict=True)):
        assert statistics.fmean(loss or 0 for loss in found) == pytest.approx(expected, rel=1e-4), f"step {step}"


def _technique(name: str, **options: Any) -> Technique:
    return registry.create("technique", name, options)  # type: ignore[no-any-return]


def _refusal(stack: str, workload: str = "train", **options: Any) -> str | None:
    """Return why a stack refuses two ranks of a CPU; the options are of its last member."""
    *others, last = stack.split("+")
    before = tuple(_technique(name) for name in others)
    made = registry.create("workload", workload, {"batch_size": 4})
    model, technique = registry.create("model", "untrained-tiny", {}), _technique(last, **options)
    for position, other in enumerate(before):
        after = (*before[position + 1 :], technique)
        if reason := other.refuse(Setting(model, made, "cpu", before[:position], after, 2)):
            return reason
    return technique.refuse(Setting(model, made, "cpu", before, (), 2))


@pytest.mark.parametrize(
    ("stack", "options", "reason"),
    [
        ("ddp", {"hook": "bf16"}, "hook = 'bf16' needs NCCL, and the ranks of a CPU communicate by gloo"),
        (
            "ddp", {"hook": "powersgd", "bucket_mb": 1},
            "over gloo, hook = 'powersgd' has all gradients in one bucket: leave bucket_mb out",
        ),
        (
            "adafactor+fsdp", {},
            "torch's Adafactor changes norms in place, which ranks that share a tensor have parts of alone",
        ),
        ("step-in-backward+ddp", {}, "'step-in-backward' uses up each gradient before it is averaged over the ranks"),
        ("zero1+step-in-backward", {}, "'step-in-backward' uses up each gradient before it is averaged over the ranks"),
        (
            "fused-linear-cross-entropy+fsdp", {},
            "'fused-linear-cross-entropy' reads the head's weight beside the module, and it is sharded there",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused_with_the_reason(stack: str, options: dict[str, Any], reason: str) -> None:
    assert _refusal(stack, **options) == reason


@pytest.mark.parametrize(
    "stack", ["fused-linear-cross-entropy+ddp", "step-in-backward+fsdp", "adafactor+zero1", "lora+fsdp"]
)
def test_two_ranks_do_not_refuse_these_stacks(stack: str) -> None:
    assert _refusal(stack) is None


def test_averaging_gradients_needs_training_and_sharding_does_not() -> None:
    assert _refusal("ddp", "forward") == "it averages gradients over ranks, and this workload has none"
    assert _refusal("fsdp", "forward") is None


def test_steps_that_warm_up_follow_from_when_a_hook_begins_to_compress() -> None:
    assert _technique("ddp").warmup_steps == 3
    assert _technique("ddp", hook="powersgd", powersgd_start=10).warmup_steps == 11
    assert _technique("ddp", hook="fp16", powersgd_start=10).warmup_steps == 3


@pytest.mark.parametrize(("start", "more"), [(2, None), (3, "1 step"), (10, "8 steps")])
def test_a_training_that_is_longer_since_it_warms_up_for_longer_says_so(start: int, more: str | None) -> None:
    stack = [_technique("bf16"), _technique("ddp", hook="powersgd", powersgd_start=start)]
    notes = note_on_more_steps(("bf16", "compressed"), stack, in_ranks=True)
    expected = f"'compressed' warms up for {start + 1} steps: loss and quality are those of a training {more} longer"
    assert notes == ([expected] if more else [])
    warmup, measured = steps_for_memory(stack, in_ranks=True)
    assert warmup + measured + 1 == sum(steps_for_memory([], in_ranks=False)) + (int(more.split()[0]) if more else 0)


def test_techniques_for_ranks_take_part_in_a_step_after_all_others() -> None:
    stack = [_technique(name) for name in ("fsdp", "accumulate", "zero1", "chunked-cross-entropy")]
    assert [type(each).__name__ for each in parallel_last(stack)] == [
        "Accumulate", "ChunkedCrossEntropy", "FullyShardedDataParallel", "ZeroRedundancy",
    ]  # fmt: skip
    assert issubclass(type(stack[2]), DistributedDataParallel)
