"""What the workloads and the tiny trained model bring forth, in real workers."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

import membench
from membench.records.record import Record

_LLAMA_15M_PARAMETERS = 15_191_712


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("workloads")
    path = folder / "workloads.toml"
    path.write_text(
        '[suite]\nname = "workloads"\n[matrix]\nmodel = ["llama-15m"]\ntechnique = ["none", "int8-weight-only"]\n'
        'workload = ["generate", "train"]\n[settings]\nmeasured_steps = 2\n'
    )
    return {record.id: record for record in membench.run(membench.load_suite(path), output=folder).records}


def test_generating_tells_first_token_and_decoding_apart(records: dict[str, Record]) -> None:
    metrics = records["llama-15m/none/generate/cpu"].metrics
    for name in ("time_to_first_token_s", "decode_tokens_per_s", "prefill_peak_live_bytes", "decode_peak_live_bytes"):
        assert (metrics[name] or 0) > 0


def test_adamw_training_holds_weights_gradients_and_two_states(records: dict[str, Record]) -> None:
    record = records["llama-15m/none/train/cpu"]
    assert record.metrics["held_live_bytes"] == pytest.approx(16 * _LLAMA_15M_PARAMETERS, rel=0.05)
    assert {"forward_s", "backward_s", "optimizer_s", "optimizer_peak_live_bytes"} <= set(record.metrics)
    assert 5 < (record.metrics["final_loss_nats"] or 0) < 11


def test_what_is_held_after_a_generation_is_the_weights_alone(records: dict[str, Record]) -> None:
    # Products in fp32 leave packing buffers of libraries behind; these are no memory of the model's.
    metrics = records["llama-15m/none/generate/cpu"].metrics
    assert metrics["held_live_bytes"] == pytest.approx(metrics["weights_bytes"], rel=0.015)


def test_the_cache_is_two_tensors_a_layer_for_every_token_but_the_last(records: dict[str, Record]) -> None:
    tokens = 128 + 32 - 1
    assert records["llama-15m/none/generate/cpu"].metrics["cache_bytes"] == 2 * 6 * 288 * tokens * 4


def test_the_breakdown_of_training_agrees_with_arithmetic(records: dict[str, Record]) -> None:
    record = records["llama-15m/none/train/cpu"]
    found = record.processes[0].breakdown_bytes
    assert found is not None
    weights = 4 * _LLAMA_15M_PARAMETERS
    for part in ("forward", "backward", "optimizer"):
        assert found[part]["weights"] == pytest.approx(weights, rel=0.001)
        assert found[part]["optimizer"] == pytest.approx(2 * weights, rel=0.001)
        assert sum(found[part].values()) == record.metrics[f"{part}_peak_live_bytes"]
    assert [found["forward"]["gradients"], found["optimizer"]["activations"]] == [0, 0]
    assert found["optimizer"]["gradients"] == pytest.approx(weights, rel=0.001)
    # AdamW works on one parameter after the other, with two temporaries of the largest, the embedding; and the
    # packing buffers of the matrix library stay until things settle: below 16 MiB where its instructions are AVX2,
    # 26 MiB where they are AVX-512.
    temporaries = 2 * 4 * 32000 * 288
    assert temporaries < found["optimizer"]["other"] < temporaries + 32 * 2**20
    # Logits and their logarithm alone are 2 × 128 tokens × 32,000 words × 4 bytes each.
    assert found["forward"]["activations"] > 2 * 2 * 127 * 32000 * 4
    assert record.metrics["optimizer_state_bytes"] == found["optimizer"]["optimizer"]


def test_a_training_keeps_its_loss_curve_and_learns(records: dict[str, Record]) -> None:
    losses = records["llama-15m/none/train/cpu"].processes[0].losses_nats or ()
    # One step to warm up, five for memory, one for the breakdown, one more to warm up, two for times.
    assert len(losses) == 10
    assert (losses[-1] or math.inf) < (losses[0] or 0)


def test_what_cannot_be_trained_is_skipped_with_the_reason(records: dict[str, Record]) -> None:
    record = records["llama-15m/int8-weight-only/train/cpu"]
    assert record.status == "skipped"
    assert record.message == "int8 weights have no gradients: they cannot be trained"


def test_int8_keeps_a_byte_a_linear_weight(records: dict[str, Record]) -> None:
    linear = 6 * (4 * 288 * 288 + 3 * 288 * 768)
    expected = 4 * (_LLAMA_15M_PARAMETERS - linear) + linear
    assert records["llama-15m/int8-weight-only/generate/cpu"].metrics["weights_bytes"] == pytest.approx(
        expected, rel=0.005
    )


def test_every_figure_says_how_it_was_obtained_or_why_it_is_missing(records: dict[str, Record]) -> None:
    for record in records.values():
        for name, value in record.metrics.items():
            assert name in (record.reasons if value is None else record.obtained)


def _prepare_briefly(cache: str) -> str:
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    from membench.builtin.models import trained_tiny

    trained_tiny._RECIPE["steps"] = 2
    model = trained_tiny.TrainedTiny()
    progress: Callable[[int, int, str], None] = lambda done, total, what: None  # noqa: E731
    model.prepare(progress)
    return str(model.path())


def test_two_that_train_at_once_end_with_one_whole_file(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.map(_prepare_briefly, [str(tmp_path)] * 2, chunksize=1)
    assert paths[0] == paths[1]
    import safetensors

    with safetensors.safe_open(paths[0], "pt") as file:
        assert "model.norm.weight" in set(file.keys())
    assert [path.suffix for path in sorted((tmp_path / "membench").iterdir())] == [".safetensors", ".lock"]
