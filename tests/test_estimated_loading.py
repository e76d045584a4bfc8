"""Estimates of ways to load a model from a file: where its weights are, and what is there besides while they come."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from membench.records.record import Record
from tests import parallel

_SUITE = """
[suite]
name = "loading"
[matrix]
model = ["small"]
technique = ["none", "plain-load", "meta-init", "mmap", "whole", "lent", "streamed+bf16"]
workload = ["pass"]
device = ["cpu"]
[technique.whole]
use = "saved"
[technique.lent]
use = "saved"
mmap = true
[workload.pass]
use = "forward"
batch_size = 1
sequence_length = 16
"""
_ROUNDING = 0.01
"""Memory comes in pages of 4 KiB."""


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    return parallel.estimates(_SUITE, tmp_path_factory.mktemp("loading"))


@pytest.mark.parametrize(
    ("technique", "weights"),
    [("plain-load", 1), ("meta-init", 1), ("mmap", 1), ("whole", 1), ("lent", 1), ("streamed+bf16", 0.5)],
)
def test_weights_are_those_that_come_out(estimates: Mapping[str, Record], technique: str, weights: float) -> None:
    found, expected = (estimates[name].metrics["weights_bytes"] for name in (technique, "none"))
    assert expected is not None
    assert found == pytest.approx(weights * expected, rel=0.0001)


@pytest.mark.parametrize(
    ("technique", "times_weights"), [("plain-load", 2), ("meta-init", 1), ("mmap", 0), ("whole", 1), ("lent", 0)]
)
def test_what_is_live_while_loading_is_so_many_times_the_weights(
    estimates: Mapping[str, Record], technique: str, times_weights: int
) -> None:
    found = estimates[technique].metrics["load_peak_live_bytes"]
    assert found == pytest.approx(
        times_weights * parallel.WEIGHTS_BYTES, rel=_ROUNDING, abs=_ROUNDING * parallel.WEIGHTS_BYTES
    )


def test_a_model_that_is_streamed_is_there_as_converted_and_with_one_layer_besides(
    estimates: Mapping[str, Record],
) -> None:
    found = estimates["streamed+bf16"].metrics["load_peak_live_bytes"]
    assert found is not None
    assert parallel.WEIGHTS_BYTES / 2 <= found <= parallel.WEIGHTS_BYTES / 2 + 1.05 * parallel.EMBEDDING_BYTES


@pytest.mark.parametrize("technique", ["mmap", "lent"])
def test_pages_of_a_file_are_not_in_the_peak(estimates: Mapping[str, Record], technique: str) -> None:
    whole, found = (estimates[name].metrics["peak_live_bytes"] for name in ("none", technique))
    assert whole is not None
    assert found is not None
    assert whole - found == pytest.approx(parallel.WEIGHTS_BYTES, rel=_ROUNDING)
