"""Estimates of techniques that read values of tensors: the rest of the case is traced, and what they name is put in.

Each is held against the same technique without the reading, whose estimate is traced.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import membench
from membench.records.record import Record
from tests import parallel

_WIDTH, _INNER_WIDTH, _HEADS = 192, 512, 4
_SUITE = f"""
[suite]
name = "arithmetic"
plugins = ["reads_values.py"]
[matrix]
model = ["small"]
device = ["cpu"]
technique = ["none", "reads-weights", "round-to-nearest", "reads-and-names-nothing"]
workload = ["pass"]
[[include]]
model = "small"
technique = ["reads-for-optimizer", "sgd-momentum", "reads-weights+lora", "reads-then-trains"]
workload = "tune"
[[include]]
model = "small"
technique = ["reads-for-cache", "kv-cache-int8"]
workload = "reply"
[technique.reads-then-trains]
use = "reads-weights-to-train"
[workload.pass]
use = "forward"
batch_size = 1
sequence_length = 64
[workload.tune]
use = "train"
batch_size = 1
sequence_length = 64
[workload.reply]
use = "generate"
batch_size = 1
prompt_length = 16
new_tokens = 4
[model.small]
use = "config"
source = "llama"
[model.small.overrides]
hidden_size = {_WIDTH}
intermediate_size = {_INNER_WIDTH}
num_hidden_layers = 2
num_attention_heads = {_HEADS}
num_key_value_heads = {_HEADS}
vocab_size = 1024
{parallel.SETTINGS}
"""
_MATRICES = 2 * (4 * _WIDTH**2 + 3 * _WIDTH * _INNER_WIDTH)
"""Weights of the decoder's linear layers."""


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "suite.toml").write_text(_SUITE)
    shutil.copy(Path(__file__).parent / "reads_values.py", folder)
    records = membench.estimate(membench.load_suite(folder / "suite.toml")).records
    return {"/".join(record.id.split("/")[1:3]): record for record in records}


def _figure(record: Record, field: str) -> float:
    value = record.metrics[field]
    assert value is not None
    return value


def test_weights_are_those_of_the_bits_that_a_technique_names(estimates: Mapping[str, Record]) -> None:
    whole, found = (_figure(estimates[name], "weights_bytes") for name in ("none/pass", "reads-weights/pass"))
    assert whole - found == 3 * _MATRICES


def test_weights_and_peak_are_near_what_is_traced(estimates: Mapping[str, Record]) -> None:
    found, traced = estimates["reads-weights/pass"], estimates["round-to-nearest/pass"]
    assert _figure(found, "weights_bytes") == pytest.approx(_figure(traced, "weights_bytes"), rel=0.01)
    assert _figure(found, "peak_live_bytes") == pytest.approx(_figure(traced, "peak_live_bytes"), rel=0.1)


def test_frozen_weights_are_converted_below_adapters(estimates: Mapping[str, Record]) -> None:
    found, traced = estimates["reads-weights+lora/tune"], estimates["lora/tune"]
    for field in ("trained_weights_bytes", "gradients_bytes", "optimizer_state_bytes", "activations_bytes"):
        assert _figure(found, field) == _figure(traced, field)
    for field in ("weights_bytes", "frozen_weights_bytes", "peak_live_bytes", "forward_peak_live_bytes"):
        assert _figure(traced, field) - _figure(found, field) == 3 * _MATRICES


def test_states_are_the_bytes_that_a_technique_names(estimates: Mapping[str, Record]) -> None:
    found, traced = estimates["reads-for-optimizer/tune"], estimates["sgd-momentum/tune"]
    assert _figure(found, "optimizer_state_bytes") == _figure(traced, "trained_weights_bytes")
    for field in ("backward_peak_live_bytes", "gradients_bytes", "activations_bytes"):
        assert _figure(found, field) == pytest.approx(_figure(traced, field), rel=0.005)


def test_the_cache_is_of_the_bits_that_a_technique_names(estimates: Mapping[str, Record]) -> None:
    found, traced = estimates["reads-for-cache/reply"], estimates["kv-cache-int8/reply"]
    head_size = _WIDTH // _HEADS
    scales = _figure(traced, "cache_bytes") * 2 / (head_size + 2)
    assert _figure(found, "cache_bytes") == pytest.approx(_figure(traced, "cache_bytes") - scales, rel=0.02)
    assert _figure(found, "peak_live_bytes") == pytest.approx(_figure(traced, "peak_live_bytes"), rel=0.02)


@pytest.mark.parametrize(
    ("technique", "left_out"),
    [
        ("reads-weights/pass", "scales, zero points and indices of weights"),
        ("reads-for-optimizer/tune", "what the optimizer's step takes besides its states"),
        ("reads-for-cache/reply", "scales of the cache"),
    ],
)
def test_figures_say_that_they_are_arithmetic_and_what_they_leave_out(
    estimates: Mapping[str, Record], technique: str, left_out: str
) -> None:
    for how in estimates[technique].obtained.values():
        if not how["source"].startswith("the highest"):
            assert how["source"].startswith("arithmetic: ")
            assert f"what '{technique.split('/')[0]}' takes besides" in how["source"]
            assert left_out in how["source"]
        assert how["bound"] == "about"


@pytest.mark.parametrize(
    ("technique", "fields"),
    [
        ("reads-weights/pass", ["apply_peak_live_bytes", "load_peak_live_bytes"]),
        ("reads-for-optimizer/tune", ["optimizer_peak_live_bytes", "warmup_peak_live_bytes"]),
        (
            "reads-then-trains/tune",
            ["peak_live_bytes", "gradients_bytes", "optimizer_state_bytes", "trained_weights_bytes"],
        ),
    ],
)
def test_what_does_not_follow_is_no_figure(estimates: Mapping[str, Record], technique: str, fields: list[str]) -> None:
    record = estimates[technique]
    assert record.status == "ok"
    assert record.metrics["weights_bytes"]
    assert not [field for field in fields if record.metrics.get(field) is not None]


def test_what_names_nothing_is_skipped_and_says_so(estimates: Mapping[str, Record]) -> None:
    record = estimates["reads-and-names-nothing/pass"]
    assert record.status == "skipped"
    assert record.message is not None
    assert record.message.startswith("it cannot be estimated: on fake tensors it ends in ")
    assert record.message.endswith("no technique names what it takes (nominal_…)")
